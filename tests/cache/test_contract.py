"""What both formats promise, inspected with plain zarr and h5py wherever our reader is not the subject."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cache
from tests.cache import making
from tests.cache.making import FINGERPRINT, FORMATS, TAPS, assert_holds, begin, build, feature, rows, write


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"store.{request.param}"


def plain(path: Path, name: str) -> np.ndarray[Any, Any]:
    """An array of a store as the format's own library reads it, without our code."""
    if path.suffix == ".zarr":
        return np.asarray(zarr.open_group(path, mode="r")[name][:])
    with h5py.File(path, "r") as file:
        return np.asarray(file[name][()])


def test_a_finished_store_reads_back_bit_for_bit(path: Path) -> None:
    wanted = rows(range(11))
    store, encoded = build(path, wanted)
    assert encoded == list(range(11))
    assert_holds(store, wanted)
    assert len(store) == 11
    assert dict(store.taps) == TAPS
    assert list(store.taps) == list(TAPS)
    assert store.fingerprint == FINGERPRINT
    assert store.provenance == {"made": "in a test"}
    assert list(path.parent.iterdir()) == [path]


def test_plain_libraries_read_the_same_numbers(path: Path) -> None:
    build(path, rows(range(11)))
    for name, tap in TAPS.items():
        array = plain(path, name)
        assert array.dtype == tap.dtype
        assert array.shape == (11, *tap.shape)
        np.testing.assert_array_equal(array, np.stack([feature(number)[name] for number in range(11)]))
    assert plain(path, "index/slot").tolist() == list(range(11))
    assert plain(path, "index/ids").tobytes().decode().split("\n") == [f"image-{number}.png" for number in range(11)]
    assert plain(path, "index/digest")[3].tobytes() == making.row(3).digest


def test_plain_libraries_find_the_fingerprint(path: Path) -> None:
    build(path, rows(range(2)))
    if path.suffix == ".zarr":
        described: Any = zarr.open_group(path, mode="r").attrs["feature_store"]
    else:
        with h5py.File(path, "r") as file:
            described = json.loads(file.attrs["feature_store"])
    assert described["fingerprint"] == FINGERPRINT.fields
    assert described["format_version"] == cache.FORMAT_VERSION - 1  # nothing in it calls for the newest


def test_plain_libraries_notice_a_flipped_bit_in_a_row(path: Path) -> None:
    build(path, rows(range(5)))
    needle = feature(2)["neck"].tobytes()
    for file in [path] if path.is_file() else sorted((path / "neck").glob("c.*")):
        content = bytearray(file.read_bytes())
        if (at := content.find(needle)) >= 0:
            content[at + 7] ^= 1
            file.write_bytes(content)
            break
    with pytest.raises(Exception, match=r"(?i)checksum|filter|crc|read"):
        plain(path, "neck")


def test_hdf5_needs_no_recent_library(tmp_path: Path) -> None:
    build(tmp_path / "store.h5", rows(range(3)))
    content = (tmp_path / "store.h5").read_bytes()
    superblock = content.find(b"\x89HDF\r\n\x1a\n")
    assert superblock >= 512
    assert content[superblock + 8] == 0, "version 0 of the superblock is what HDF5 1.x before 1.10 reads"


def test_formats_agree(tmp_path: Path) -> None:
    stores = [build(tmp_path / f"store.{suffix}", rows(range(9)))[0] for suffix in FORMATS]
    order = [8, 0, 0, 5]
    first, second = (store.read(order) for store in stores)
    for name in TAPS:
        assert first[name].tobytes() == second[name].tobytes()


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, 12), max_size=30), verify=st.booleans(), taps=st.sets(st.sampled_from(list(TAPS))))
def test_any_rows_in_any_order(
    order: list[int], verify: bool, taps: set[str], thirteen: dict[str, cache.Store], fmt: str
) -> None:
    read = thirteen[fmt].read(order, taps=sorted(taps), verify=verify)
    assert read.keys() == taps
    for name, array in read.items():
        assert array.shape == (len(order), *TAPS[name].shape)
        for i, number in enumerate(order):
            assert array[i].tobytes() == feature(number)[name].tobytes()


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, cache.Store]:
    folder = tmp_path_factory.mktemp("thirteen")
    return {suffix: build(folder / f"store.{suffix}", rows(range(13)))[0] for suffix in FORMATS}


def test_reading_fills_the_callers_buffer(path: Path) -> None:
    store, _ = build(path, rows(range(6)))
    buffer = {"neck": np.full((3, *TAPS["neck"].shape), -1, np.float16)}
    read = store.read([5, 1, 3], taps=["neck"], out=buffer)
    assert read["neck"] is buffer["neck"]
    np.testing.assert_array_equal(buffer["neck"][1], feature(1)["neck"])


@pytest.mark.parametrize("kind", ["shape", "type", "strided", "read-only", "missing"])
def test_an_unfit_buffer_is_refused(path: Path, kind: str) -> None:
    store, _ = build(path, rows(range(4)))
    shape = (2, *TAPS["neck"].shape)
    good = np.zeros(shape, np.float16)
    bad = {
        "shape": {"neck": np.zeros((3, *shape[1:]), np.float16)},
        "type": {"neck": np.zeros(shape, np.float64)},
        "strided": {"neck": np.zeros((4, *shape[1:]), np.float16)[::2]},
        "read-only": {"neck": np.frombuffer(good.tobytes(), np.float16).reshape(shape)},
        "missing": {"block:31": good},
    }[kind]
    with pytest.raises(cache.StoreError, match="neck"):
        store.read([0, 1], taps=["neck"], out=bad)


@pytest.mark.parametrize("order", [[4], [-1], [0.5], [[0]], [True]])
def test_rows_that_do_not_exist_are_refused(path: Path, order: Any) -> None:
    store, _ = build(path, rows(range(4)))
    with pytest.raises(cache.StoreError, match="whole numbers from 0 to 3"):
        store.read(order)


def test_an_unknown_tap_is_refused_by_name(path: Path) -> None:
    store, _ = build(path, rows(range(4)))
    with pytest.raises(cache.StoreError, match=r"no tap 'nck'.*'neck'"):
        store.read([0], taps=["nck"])


def test_a_store_pickles_by_path_and_reads_in_another_process(path: Path) -> None:
    store, _ = build(path, rows(range(6)))
    store.read([0])
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert_holds(pickle.loads(data), rows(range(6)))


def test_a_pickled_store_refuses_another_version(path: Path) -> None:
    store, _ = build(path, rows(range(6)))
    data = pickle.dumps(store)
    build(path, rows(range(7)))
    with pytest.raises(cache.StoreError, match="replaced by another version"):
        pickle.loads(data).read([0])


def test_threads_read_at_once(path: Path) -> None:
    store, _ = build(path, rows(range(40)))

    def one(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 40, 16)
        read = store.read(order)
        return all((read["neck"][i] == feature(int(n))["neck"]).all() for i, n in enumerate(order))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(64)))


def test_another_fingerprint_is_refused_with_its_fields(path: Path) -> None:
    build(path, rows(range(3)))
    other = cache.Fingerprint({"encoder": "fake", "weights_sha256": "11", "taps": {"neck": {"pool": 4}}})
    for attempt in (
        lambda: cache.open_store(path, expect=other),
        lambda: begin(path, rows(range(3)), fingerprint=other),
    ):
        with pytest.raises(cache.FingerprintMismatchError) as caught:
            attempt()
        assert {found.field for found in caught.value.differences} == {"weights_sha256", "taps.neck.pool"}
        assert "weights_sha256 is '00' there" in str(caught.value)
    assert_holds(cache.open_store(path, expect=FINGERPRINT), rows(range(3)))


def test_other_shapes_under_the_same_fingerprint_are_refused(path: Path) -> None:
    build(path, rows(range(3)))
    with pytest.raises(cache.FingerprintMismatchError, match=r"stored\.neck\.shape"):
        begin(path, rows(range(3)), taps={**TAPS, "neck": cache.TapSpec(4, 3, 4, "float16")})


def test_unfinished_work_of_another_fingerprint_is_refused_before_any_feature(path: Path) -> None:
    with begin(path, rows(range(6))) as writer:
        write(writer, writer.pending[0], rows(range(6)))
    other = cache.Fingerprint({"encoder": "another"})
    with pytest.raises(cache.FingerprintMismatchError, match=r"partial.*encoder is 'fake' there and 'another' here"):
        begin(path, rows(range(3)), fingerprint=other)
    store, _ = build(path, rows(range(3)), fingerprint=other, replace=True)
    assert store.fingerprint == other


def test_a_run_of_another_fingerprint_that_finished_nothing_is_in_nobodys_way(path: Path) -> None:
    begin(path, rows(range(3))).close()
    other = cache.Fingerprint({"encoder": "another"})
    store, encoded = build(path, rows(range(3)), fingerprint=other)
    assert (store.fingerprint, encoded) == (other, [0, 1, 2])


def test_another_type_than_there_is_to_read_is_refused(path: Path) -> None:
    store, _ = build(path, rows(range(2)))
    with pytest.raises(cache.StoreError, match="dtype is 'float8'; give 'float32', 'stored', or None"):
        store.read([0], dtype="float8")  # type: ignore[arg-type]


def test_replacing_keeps_the_old_store_readable_until_the_commit(path: Path) -> None:
    old, _ = build(path, rows(range(5)))
    other = cache.Fingerprint({"encoder": "another"})
    with begin(path, rows(range(5)), fingerprint=other, replace=True) as writer:
        for plan in writer.pending:
            write(writer, plan, rows(range(5)))
            assert_holds(cache.open_store(path, expect=FINGERPRINT), rows(range(5)))
        assert len(writer.pending) == 2
        new = writer.commit()
    assert new.fingerprint == other
    assert list(path.parent.iterdir()) == [path]
    assert old.version != new.version


def test_rows_set_aside_are_recorded_with_their_reason(path: Path) -> None:
    wanted = rows(range(6))
    with begin(path, wanted) as writer:
        for plan in writer.pending:
            bad = {2: "the feature is not finite"} if 2 in plan.rows else {}
            write(writer, plan, wanted, set_aside=bad)
        store = writer.commit()
    assert_holds(store, rows([0, 1, 3, 4, 5]))
    assert store.set_aside == {"image-2.png": "the feature is not finite"}
    assert cache.verify(path) == ()
    again, encoded = build(path, wanted)
    assert encoded == [2], "what failed once is tried again, and nothing else"
    assert_holds(again, wanted)


def test_a_store_of_nothing_is_refused(path: Path) -> None:
    wanted = rows(range(2))
    with pytest.raises(cache.StoreError, match="at least one row"):
        begin(path, [])
    with begin(path, wanted) as writer:
        write(writer, writer.pending[0], wanted, set_aside={0: "bad", 1: "bad"})
        with pytest.raises(cache.IncompleteRowsError, match=r"all 2 rows are set aside \(bad\)"):
            writer.commit()


def test_commit_before_the_last_shard_is_refused(path: Path) -> None:
    wanted = rows(range(6))
    with begin(path, wanted) as writer:
        write(writer, writer.pending[0], wanted)
        with pytest.raises(cache.IncompleteRowsError, match="2 rows are not written"):
            writer.commit()
    assert not path.exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([cache.Row("", bytes(32))], "non-empty"),
        ([making.row(0, "a\nb")], "control characters"),
        ([making.row(0, "a\ud800")], "control characters"),
        ([making.row(0, "a"), making.row(1, "a")], "twice"),
        ([cache.Row("a", b"short")], "5 bytes"),
    ],
)
def test_rows_that_no_store_can_hold_are_refused(path: Path, bad: list[cache.Row], message: str) -> None:
    with pytest.raises(cache.StoreError, match=message):
        begin(path, bad)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    "name", ["", "../x", "/x", "a/b", ".hidden", "index", "zarr.json", "README.md", "a" * 65, "a b"]
)
def test_tap_names_that_no_folder_can_have_are_refused(path: Path, name: str) -> None:
    with pytest.raises(cache.StoreError, match="tap"):
        begin(path, rows([0]), taps={name: TAPS["neck"]})


def test_features_that_do_not_fit_the_plan_are_refused(path: Path) -> None:
    with begin(path, rows(range(2))) as writer:
        plan = writer.pending[0]
        good = {name: np.zeros((2, *tap.shape), tap.dtype) for name, tap in TAPS.items()}
        ones = np.ones((2, 2), np.float32)
        with pytest.raises(cache.StoreError, match="float16 array of shape"):
            writer.write(plan, {**good, "neck": good["neck"].astype(np.float32)}, ones)
        with pytest.raises(cache.StoreError, match=r"expected \['block:31', 'neck'\]"):
            writer.write(plan, {"neck": good["neck"]}, ones)
        for wrong in (0, 1.5, np.nan):
            with pytest.raises(cache.StoreError, match="fractions"):
                writer.write(plan, good, ones * wrong)
        with pytest.raises(cache.StoreError, match="not pending"):
            writer.write(cache.ShardPlan(7, (0,)), good, ones)


def test_no_store_is_said_so(path: Path) -> None:
    with pytest.raises(cache.StoreNotFoundError, match="there is no store"):
        cache.open_store(path)
    begin(path, rows(range(2))).close()
    with pytest.raises(cache.StoreNotFoundError, match="one was begun"):
        cache.open_store(path)


def test_what_is_no_store_is_said_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(3)
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "empty.h5").touch()
    (tmp_path / "folder.h5").mkdir()
    for name in ("other.h5", "other.zarr", "text.h5", "empty.h5", "folder.h5"):
        with pytest.raises(cache.FormatError, match=name):
            cache.open_store(tmp_path / name)
    with pytest.raises(cache.StoreError, match=r"store.npy is no store: the name of one ends in .zarr, .h5 or .hdf5"):
        cache.open_store(tmp_path / "store.npy")


def test_info_tells_what_there_is_and_how_far_a_run_came(path: Path) -> None:
    wanted = rows(range(10))
    with begin(path, wanted) as writer:
        write(writer, writer.pending[0], wanted)
    begun = cache.info(path)
    assert (begun.complete, begun.rows, begun.shards, begun.shards_done) == (False, 10, 3, 1)
    assert cache.info(path.with_name(path.name + ".partial")) == begun
    build(path, wanted)
    done = cache.info(path)
    assert (done.complete, done.rows, done.slots) == (True, 10, 10)
    assert done.bytes_on_disk == sum(len(content) for content in making.files(path).values())
    assert done.taps == TAPS
    assert begun.written <= done.written <= datetime.now(UTC).isoformat()
    assert datetime.now(UTC) - datetime.fromisoformat(begun.written) < timedelta(minutes=5)


def test_a_store_may_be_closed_while_another_thread_reads(path: Path) -> None:
    store, _ = build(path, wanted := rows(range(11)))
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(lambda: [assert_holds(store, wanted) for _ in range(100)])
        while not reading.done():
            store.close()
    assert reading.result()
