"""Checkpoints: what is read, what is refused and in which words, and how digests are remembered."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from segment_anything import sam_model_registry
from torch import Tensor

from pipeline.encoders import ARCHITECTURES, load_encoder, weights_sha256
from pipeline.errors import CheckpointError
from tests.encoders.seeded import seeded_state

DEMO = ARCHITECTURES["sam_demo"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return seeded_state(DEMO)


@pytest.mark.parametrize("name", ["sam_vit_b", "sam_vit_l", "sam_vit_h"])
def test_the_layout_is_that_of_the_official_models(name: str) -> None:
    with torch.device("meta"):
        official = sam_model_registry[name.removeprefix("sam_")](checkpoint=None).image_encoder
    ours = ARCHITECTURES[name].build()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in official.state_dict().items()}
    for block, official_block in zip(ours.blocks, official.blocks, strict=True):
        assert block.window_size == official_block.window_size
        assert block.attn.num_heads == official_block.attn.num_heads
        assert block.norm1.eps == official_block.norm1.eps


@pytest.mark.parametrize("prefix", ["", "image_encoder."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_whole_sam_and_an_encoder_alone_load_to_the_same(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    saved = {prefix + key: value.contiguous() for key, value in state.items()}
    if prefix:
        saved |= {
            "mask_decoder.iou_token.weight": torch.ones(1, 4),
            "prompt_encoder.no_mask_embed.weight": torch.ones(1),
        }
    save_file(saved, path) if suffix == ".safetensors" else torch.save(saved, path)
    loaded = load_encoder(DEMO, path)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def refusal(path: Path, state: dict[str, Tensor], name: str = "sam_demo") -> str:
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(ARCHITECTURES[name], path)
    return str(caught.value)


def test_keys_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "changed.pth"
    changed = {key: value for key, value in state.items() if key != "blocks.2.norm1.bias"}
    changed |= {"extra.weight": torch.ones(1), "neck.1.weight": torch.ones(63)}
    assert refusal(path, changed) == (
        f"{path}: its keys are not those of sam_demo: missing 1 ('blocks.2.norm1.bias'); unknown 1 ('extra.weight'); "
        f"misshapen 1 ('neck.1.weight' (63,) instead of (64,)); this looks like sam_demo"
    )


def test_an_unknown_part_of_a_whole_sam_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = {f"image_encoder.{key}": value for key, value in state.items()} | {"adapter.weight": torch.ones(1)}
    assert "unknown 1 ('adapter.weight')" in refusal(tmp_path / "whole.pth", whole)


def test_a_checkpoint_of_another_size_is_recognised(tmp_path: Path, state: dict[str, Tensor]) -> None:
    message = refusal(tmp_path / "demo.pth", state, "sam_vit_b")
    assert message.endswith("this looks like sam_demo")
    assert "'pos_embed' (1, 16, 16, 96) instead of (1, 64, 64, 768)" in message
    large = {
        key: torch.zeros(1).expand(shape.shape)
        for key, shape in ARCHITECTURES["sam_vit_l"].build().state_dict().items()
    }
    assert refusal(tmp_path / "large.pth", large).endswith("this looks like sam_vit_l")
    assert "this looks like none of sam_vit_b," in refusal(tmp_path / "other.pth", {"fc.weight": torch.ones(2)})


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path, witness = tmp_path / "bad.pth", tmp_path / "witness"
    torch.save({"pos_embed": Malicious(witness)}, path)
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load_encoder(DEMO, path)
    path.write_bytes(pickle.dumps(Malicious(witness), protocol=2))
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load_encoder(DEMO, path)
    assert not witness.exists()


def test_a_file_that_is_not_there_or_not_a_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            load_encoder(DEMO, path)
        with pytest.raises(CheckpointError, match=path.name):
            weights_sha256(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 0.999), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_a_file_cut_short_is_refused(tmp_path: Path, cut: float, suffix: str) -> None:
    path = tmp_path / f"whole{suffix}"
    small = {"pos_embed": torch.ones(1, 4, 4, 8), "neck.1.bias": torch.ones(8)}
    save_file(small, path) if suffix == ".safetensors" else torch.save(small, path)
    whole = path.read_bytes()
    torn = tmp_path / f"torn{suffix}"
    torn.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(CheckpointError, match="torn"):
        load_encoder(DEMO, torn)


def test_a_digest_is_remembered_until_a_file_changes_whatever_time_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"first")
    assert weights_sha256(path) == hashlib.sha256(b"first").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", None)
        assert weights_sha256(path) == hashlib.sha256(b"first").hexdigest()  # not read again
    status = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_sha256(path) == hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize("memory", ["", "[]", '{"KEY": 3}', '{"KEY": [1]}', "\x00"])
def test_a_spoilt_memory_of_digests_is_made_anew(tmp_path: Path, user_folder: Path, memory: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"first")
    user_folder.mkdir()
    (user_folder / "digests.json").write_text(memory.replace("KEY", str(path)))
    assert weights_sha256(path) == hashlib.sha256(b"first").hexdigest()


def test_a_user_folder_that_cannot_be_written_to_costs_nothing_but_time(tmp_path: Path, user_folder: Path) -> None:
    user_folder.write_text("a file where the folder should be")
    path = tmp_path / "weights.pth"
    path.write_bytes(b"first")
    assert weights_sha256(path) == hashlib.sha256(b"first").hexdigest()
