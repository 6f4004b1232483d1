"""What a person reads when something is wrong: one line that says what to do, an exit status, never a traceback."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import _explain

from .conftest import TINY, complaint, copy_of, environment, run_pipeline, succeed

DEMO = "data: {layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0}"


def folder_of_images(root: Path, classes: dict[str, int], *, size_px: int = 48) -> None:
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 255, (size_px, size_px), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def folder_config(work: Path, root: str = "images") -> str:
    (work / "folder.yaml").write_text(TINY.replace(DEMO, f"data: {{layout: folder, path: {root}}}"))
    return "folder.yaml"


def test_no_such_config(tmp_path: Path) -> None:
    assert "nothing.yaml: cannot be read" in complaint(tmp_path, "train", "-c", "nothing.yaml", status=2)


def test_a_typo_in_a_key(work: Path) -> None:
    said = complaint(work, "train", "-c", "tiny.yaml", "--set", "train.epoch=3", status=2)
    assert "train.epoch: unknown key (value 3); did you mean 'epochs'?" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.pool=0", "--set encoder.pool: got 0, expected greater than or equal to 1, or a mapping"),
        ("encoder.pool={neck: 0}", "encoder.pool.neck: got 0, expected greater than or equal to 1"),
        ("model.fuse=late", "--set model.fuse: got 'late', expected a list"),
        ("data.expect={trian: 3}", "data.expect.trian: got 'trian', expected 'train', 'val', 'test' or 'all'"),
    ],
)
def test_a_value_that_may_be_of_several_kinds_is_one_line(tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (line,) = complaint(tmp_path, "train", "-c", "tiny.yaml", "--set", override, status=2).splitlines()
    assert line.startswith("error: ")
    assert line.endswith(said)


def test_without_ray_the_command_names_the_extra(work: Path) -> None:
    program = "import sys; sys.modules['ray'] = None; from pipeline.cli import main; main()"
    command = [sys.executable, "-c", program, "extract", "-c", "tiny.yaml", "--ray"]
    done = subprocess.run(command, cwd=work, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs the extra 'ray'" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_such_study_or_base(tmp_path: Path) -> None:
    assert "configs/studies/*.yaml here, and docs/studies.md says" in complaint(
        tmp_path, "study", "-c", "nothing.yaml", status=2
    )
    (tmp_path / "study.yaml").write_text("{base: nothing.yaml, folder: s, baseline: a, variants: {a: {}}}")
    assert "study.yaml: base: nothing.yaml: cannot be read" in complaint(
        tmp_path, "study", "-c", "study.yaml", status=2
    )


def test_an_unknown_command_or_option_is_wrong_use(tmp_path: Path) -> None:
    assert run_pipeline(tmp_path, "trian").returncode == 2
    assert run_pipeline(tmp_path, "train", "--fast").returncode == 2


def test_a_checkpoint_of_another_size(work: Path) -> None:
    said = complaint(work, "extract", "-c", "tiny.yaml", "--set", "encoder.name=sam_vit_b", status=1)
    assert "weights/sam_demo.pth" in said
    assert "sam_demo" in said.replace("weights/sam_demo.pth", "")


def test_no_checkpoint(work: Path) -> None:
    said = complaint(work, "extract", "-c", "tiny.yaml", "--set", "encoder.checkpoint=weights/none.pth", status=1)
    assert "there is no file 'weights/none.pth': run `pipeline prepare`" in said


def test_a_published_checkpoint_not_fetched_yet(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "empty"))
    said = complaint(
        work, "extract", "-c", "tiny.yaml", "--set", "encoder.name=sam_vit_b", "--set", "encoder.checkpoint=sam_vit_b",
        status=1,
    )  # fmt: skip
    assert "run `pipeline prepare`, which downloads them, or put the file at" in said
    assert str(tmp_path / "empty/weights/sam_vit_b_01ec64.pth") in said


def test_a_folder_that_is_no_store(work: Path) -> None:
    assert "error: data is no store: the name of one ends in .zarr" in complaint(
        work, "store", "verify", "data", status=1
    )


def test_a_checkpoint_with_code_is_not_run(work: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path("sprung"),))  # type: ignore[return-value]

    torch.save({"trap": Trap()}, work / "weights/trap.pth")
    said = complaint(work, "extract", "-c", "tiny.yaml", "--set", "encoder.checkpoint=weights/trap.pth", status=1)
    assert "weights/trap.pth" in said
    assert not (work / "sprung").exists()


def test_an_image_without_a_pixel_left_is_set_aside(work: Path) -> None:
    folder_of_images(work / "images", {"a": 12, "b": 12})
    Image.new("L", (3000, 1)).save(work / "images/a/3.png")
    config = folder_config(work)
    report = succeed(work, "extract", "-c", config, status=3)
    ((sample, reason),) = report["set_aside"].items()
    assert "3" in sample
    assert "an image of 1x3000 px has no pixel left at 256 px" in reason
    assert report["rows"] == 23
    assert "has no pixel left" in complaint(
        work, "extract", "-c", config, "--strict", "--set", "store.path=features/strict.zarr", status=1
    )


def test_a_truncated_image_is_set_aside_and_tried_again(work: Path) -> None:
    folder_of_images(work / "images", {"a": 12, "b": 12})
    bad = work / "images/a/3.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    config = folder_config(work)
    report = succeed(work, "extract", "-c", config, status=3)
    ((sample, reason),) = report["set_aside"].items()
    assert "3" in sample
    assert "a/3.png" in reason
    assert report["rows"] == 23
    said = complaint(work, "extract", "-c", config, "--strict", status=1)
    assert "a/3.png" in said
    said = complaint(work, "train", "-c", config, status=1)
    assert "lacks 1 of" in said
    assert f"1 were set aside, as {sample!r}" in said
    assert "leave them out with `--set train.allow_missing=true`" in said
    succeed(work, "train", "-c", config, "--set", "train.allow_missing=true", "--set", "run=runs/without")
    bad.write_bytes(whole)
    report = succeed(work, "extract", "-c", config)
    assert (report["encoded"], report["reused"], report["rows"]) == (1, 23, 24)


def test_an_empty_class(work: Path) -> None:
    folder_of_images(work / "images", {"a": 8, "b": 8})
    (work / "images/c").mkdir()
    assert "images/c: the class has no image" in complaint(work, "extract", "-c", folder_config(work), status=1)


def test_one_class_only_in_val(work: Path) -> None:
    for split, classes in {"train": {"a": 6}, "val": {"a": 3, "b": 3}, "test": {"a": 3}}.items():
        folder_of_images(work / "images" / split, classes)
    assert "train has no sample of b (val 3, test 0)" in complaint(
        work, "extract", "-c", folder_config(work), status=1
    ).replace("'", "")


def test_a_store_of_another_fingerprint(work: Path) -> None:
    succeed(work, "extract", "-c", "tiny.yaml")
    said = complaint(work, "extract", "-c", "tiny.yaml", "--set", "encoder.pool=8", status=1)
    assert "pool" in said
    assert "features/demo.zarr" in said
    assert "--replace" in said
    report = succeed(work, "extract", "-c", "tiny.yaml", "--set", "encoder.pool=8", "--replace")
    assert report["encoded"] == 48


def test_a_model_refuses_features_of_another_fingerprint(work: Path) -> None:
    succeed(work, "extract", "-c", "tiny.yaml")
    succeed(work, "train", "-c", "tiny.yaml")
    succeed(work, "extract", "-c", "tiny.yaml", "--set", "encoder.pool=8", "--replace")
    assert "pool is 8 and was 4 in training" in complaint(work, "evaluate", "-c", "tiny.yaml", status=1)


def test_an_hdf5_file_that_is_none(work: Path) -> None:
    (work / "features").mkdir()
    (work / "features/demo.h5").write_bytes(b"these are no features" * 1000)
    said = complaint(work, "train", "-c", "tiny.yaml", "--set", "store.path=features/demo.h5", status=1)
    assert "features/demo.h5" in said
    assert "features/demo.h5" in complaint(work, "store", "info", "features/demo.h5", status=1)


def test_a_store_that_is_not_there(work: Path) -> None:
    assert "features/demo.zarr" in complaint(work, "train", "-c", "tiny.yaml", status=1)
    assert "nowhere.zarr" in complaint(work, "store", "info", "nowhere.zarr", status=1)


def test_no_space_left(work: Path) -> None:
    limit = 300_000  # bytes that a file may have, as a full disk would cut it off

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "pipeline", "extract", "-c", "tiny.yaml", "--set", "encoder.pool=1"]
    done = subprocess.run(
        command, cwd=work, env=environment(), capture_output=True, text=True, check=False, preexec_fn=limited
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "space" in done.stderr
    assert succeed(work, "extract", "-c", "tiny.yaml", "--set", "encoder.pool=1")["rows"] == 48


@pytest.mark.parametrize(
    ("command", "limit", "named"),
    [
        (("prepare", "--set", "data.path=data/more"), 600, "data/more"),
        (("prepare", "--set", "encoder.checkpoint=weights/more.pth"), 60_000, "weights/more.pth"),
        (("extract",), 200, "features/demo.zarr.seen.npz"),
        (("train", "--set", "model.gates=[]"), 60_000, "runs/demo/"),
    ],
)
def test_a_full_disk_is_told_with_the_file_that_did_not_fit(
    work: Path, command: tuple[str, ...], limit: int, named: str
) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command, "-c", "tiny.yaml"],
        cwd=work,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert named in line
    assert "make " in line


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there(work: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    said = complaint(work, "extract", "-c", "tiny.yaml", "--set", f"resources.device={device}", status=2)
    assert "resources.device" in said


def test_what_the_operating_system_refuses_is_one_line(trained: Path, tmp_path: Path) -> None:
    work = copy_of(trained, tmp_path / "work")
    (work / "file").write_text("mine")
    (work / "folder.h5").mkdir()
    succeed(work, "store", "push", "features/demo.zarr", "sent", "-c", "tiny.yaml")
    for command in (
        ("store", "convert", "features/demo.zarr", "file/x.zarr"),
        ("store", "convert", "features/demo.zarr", "folder.h5"),
        ("store", "push", "features/demo.zarr", "file/x"),
        ("store", "push", "features/demo.zarr", "there", "--pseudonymise", "file/key"),
        ("store", "pull", "sent", "file/x.zarr"),
    ):
        said = complaint(work, *command, status=1)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert command[-1].split("/")[0] in line
    assert (work / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make space"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: permission denied; ask for the right to it"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a", None, "b"), "a -> b: is a directory; move what is in"),
        (OSError("cannot\nread it"), "cannot read it"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_an_error_of_the_system_says_which_file_why_and_what_to_do(
    error: OSError, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _explain(error) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}")
    assert shown.count("\n") == 1
