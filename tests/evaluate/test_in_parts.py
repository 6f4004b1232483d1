"""A table of predictions in parts: continued after a stop to the same bytes, never stale, never overwritten."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from cache import StoreLockedError
from pipeline.errors import DataError, RunError
from pipeline.evaluate import in_parts
from pipeline.evaluate.in_parts import Part, making
from pipeline.records import read_csv

CLASSES = ("a", "=b")
ABOUT = {"model": "0" * 64}
NAMES = [f"images/{i}.png" for i in range(11)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_parts, "PART_IMAGES", 4)
    Path("images").mkdir()
    for name in NAMES:
        Path(name).write_bytes(name.encode())


def said_of(names: tuple[str, ...]) -> dict[str, Any]:
    """What a predictor would say: figures made of the files, and the fifth cannot be read."""
    rows = []
    for name in names:
        share = Path(name).stat().st_size / 7 / (1 + int(Path(name).stem))
        rows.append({"image": name, "predicted": "=b", "probabilities": {"a": share, "=b": 1 - share}})
    bad = {name: f"{name}: torn" for name in names if name == NAMES[5]}
    return {"predictions": [row for row in rows if row["image"] not in bad], "set_aside": bad}


def run(path: Path, *, stop_after: int | None = None, **options: Any) -> tuple[list[int], in_parts.Summary | None]:
    """Make a table, or stop; the numbers of the parts that were made."""
    made: list[int] = []
    about = options.pop("about", ABOUT)
    with making(path, options.pop("names", NAMES), CLASSES, about, **options) as table:
        for part in reversed(list(table.pending())):  # any order
            if len(made) == stop_after:
                break
            table.put(part, said_of(part.names))
            made.append(part.number)
        return made, None if len(made) == stop_after else table.join()


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_every_stopped_run_continues_to_the_same_bytes(name: str) -> None:
    made, whole = run(Path("once") / name)
    assert whole is not None
    assert made == [2, 1, 0]
    for stop in range(4):
        assert run(Path(f"{stop}") / name, stop_after=stop)[0] == made[:stop]
        again, summary = run(Path(f"{stop}") / name)
        assert again == made[stop:]
        assert summary is not None
        assert (summary.images, summary.kept) == (11, sum((3, 4, 4)[:stop]))
        assert (summary.predicted, summary.set_aside) == ({"a": 0, "=b": 10}, {NAMES[5]: f"{NAMES[5]}: torn"})
        assert summary.predictions == whole.predictions
        assert Path(f"{stop}", name).read_bytes() == Path("once", name).read_bytes()
        assert {path.name for path in Path(f"{stop}").iterdir()} == {name, "p_set_aside.csv"}
    assert read_csv(Path("once/p_set_aside.csv")) == [{"image": NAMES[5], "reason": f"{NAMES[5]}: torn"}]


def test_both_formats_have_the_same_rows_in_order() -> None:
    run(Path("p.csv"))
    run(Path("p.parquet"))
    rows = read_csv(Path("p.csv"))
    assert [row["image"] for row in rows] == [name for name in NAMES if name != NAMES[5]]
    typed = [{**row, "p_a": float(row["p_a"]), "p_=b": float(row["p_=b"])} for row in rows]
    assert pyarrow.parquet.read_table("p.parquet").to_pylist() == typed


def test_a_part_whose_image_has_changed_is_made_again() -> None:
    run(Path("p.csv"), stop_after=2)
    os.utime(NAMES[4], (1, 1))
    assert run(Path("p.csv"))[0] == [1, 0]


def test_a_part_that_was_taken_apart_is_put_together_in_order() -> None:
    run(Path("whole.csv"))
    with making(Path("p.csv"), NAMES, CLASSES, ABOUT) as table:
        for part in table.pending():
            left, right = part.halves()
            for piece in (right, *reversed(left.halves() or (left,))):
                assert not (Path("p.csv.partial") / f"{part.number:07d}.json").exists()
                table.put(piece, said_of(piece.names))
            assert (Path("p.csv.partial") / f"{part.number:07d}.json").exists()
            assert Part(0, ("one",), "").halves() == ()
        assert table.done == 11
        table.join()
    assert Path("p.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_parts_of_other_predictions_are_neither_taken_nor_lost() -> None:
    run(Path("p.csv"), stop_after=2)
    for options in ({"about": {"model": "1" * 64}}, {"names": NAMES[:-1]}):
        with pytest.raises(RunError, match=r"parts of other predictions: (model|images)"):
            run(Path("p.csv"), **options)
    assert run(Path("p.csv"))[0] == [0]
    before = Path("p.csv").read_bytes()
    with pytest.raises(RunError, match=r"'p\.csv' is there already: name another file, or make it again"):
        run(Path("p.csv"))
    assert run(Path("p.csv"), replace=True, names=NAMES[:4], stop_after=0) == ([], None)
    assert Path("p.csv").read_bytes() == before  # until the other is whole
    assert run(Path("p.csv"), replace=True, names=NAMES[:4])[0] == [0]
    assert not Path("p_set_aside.csv").exists()


def test_one_makes_a_table_at_a_time() -> None:
    with making(Path("p.csv"), NAMES, CLASSES, ABOUT), pytest.raises(StoreLockedError, match="is being written by"):
        run(Path("p.csv"))


def test_images_of_which_none_can_be_read_give_no_table() -> None:
    with pytest.raises(DataError, match="torn"):
        run(Path("p.csv"), names=[NAMES[5]])
    assert not Path("p.csv").exists()
    mended = {"predictions": [{"image": NAMES[5], "predicted": "a", "probabilities": dict.fromkeys(CLASSES, 0.5)}]}
    with making(Path("p.csv"), [NAMES[5]], CLASSES, ABOUT) as table:
        (part,) = table.pending()  # tried again, though size and time are the same
        table.put(part, {**mended, "set_aside": {}})
        assert table.join().kept == 0


def test_a_name_that_no_table_can_hold_is_told_before_anything_is_made() -> None:
    with (
        pytest.raises(DataError, match=r"1 names are no text in UTF-8, .*'images/b\\udce4r\.png'; rename them"),
        making(Path("p.csv"), [*NAMES, os.fsdecode(b"images/b\xe4r.png")], CLASSES, ABOUT),
    ):
        pass
    assert not Path("p.csv.partial").exists()


def test_another_ending_is_refused() -> None:
    with pytest.raises(RunError, match=r"p\.json: predictions are written as \.csv or \.parquet"):
        run(Path("p.json"))
