import numpy as np
import pytest
import tensorflow as tf

from elita_tf.data import (
    evaluation_windows,
    num_training_windows,
    pack_windows,
    stream_windows,
    training_batch,
    training_windows,
)

CONTEXT, BATCH = 4, 3
IDS = np.arange(100, 100 + 41, dtype=np.uint16)  # 8 windows of 5 and one id over: 2 steps an epoch
KEYWORDS = {"context_length": CONTEXT, "batch_size": BATCH, "seed": 7}


def windows_of(ids=IDS, start=0, steps=2, **changes):
    keywords = {**KEYWORDS, **changes}
    return np.concatenate([training_batch(ids, start + i, **keywords) for i in range(steps)])


def epoch(number, **changes):
    return windows_of(start=2 * number, **changes)


def test_an_epoch_takes_windows_once():
    assert num_training_windows(IDS, CONTEXT) == 8
    windows = epoch(0)
    starts = sorted(windows[:, 0].tolist())
    assert len(set(starts)) == 6
    assert set(starts) <= set(range(100, 140, 5))
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(CONTEXT + 1))


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    np.testing.assert_array_equal(epoch(3), epoch(3))
    assert not np.array_equal(epoch(0), epoch(1))
    assert not np.array_equal(epoch(0), epoch(0, seed=8))
    assert not np.array_equal(epoch(0, seed=8), epoch(1, seed=7))


def test_windows_left_over_come_in_other_epochs():
    starts = {start for number in range(20) for start in epoch(number)[:, 0].tolist()}
    assert starts == set(range(100, 140, 5))


def test_labels_are_the_next_ids_and_shapes_are_static():
    dataset = training_windows(IDS, **KEYWORDS)
    for inputs, labels in dataset.take(3):
        np.testing.assert_array_equal(labels, inputs["token_ids"] + 1)
    spec = tf.TensorSpec((BATCH, CONTEXT), tf.int32)
    assert dataset.element_spec == ({"token_ids": spec}, spec)


def test_the_dataset_is_the_batches_in_order_from_any_step():
    for start in (0, 3):
        dataset = training_windows(IDS, **KEYWORDS, start_step=start).take(4)
        labels = np.concatenate([y for _, y in dataset])
        np.testing.assert_array_equal(labels, windows_of(start=start, steps=4)[:, 1:])


def test_a_large_seed_and_many_windows_are_shuffled():
    ids = np.arange(5 * 3000, dtype=np.uint32)
    starts = windows_of(ids, steps=1000, seed=2**40)[:, 0] // 5
    assert sorted(starts) == list(range(3000))
    assert abs(np.corrcoef(starts, np.arange(3000))[0, 1]) < 0.1


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_memory_mapped_file_gives_the_same_windows(tmp_path, dtype):
    path = tmp_path / "ids"
    path.write_bytes(IDS.astype(dtype).tobytes())
    mapped = np.memmap(path, dtype, mode="r")
    np.testing.assert_array_equal(windows_of(mapped), windows_of(IDS))
    np.testing.assert_array_equal(windows_of(mapped[1:]), windows_of(IDS[1:]))
    *_, (_, labels, _) = evaluation_windows(mapped, context_length=4, batch_size=3)
    assert labels[0].numpy().tolist() == [137, 138, 139, 140]


def test_ids_written_again_to_the_same_path(tmp_path):
    path = tmp_path / "ids"
    for ids in (IDS, IDS[::-1], IDS + 7):
        path.unlink(missing_ok=True)
        path.write_bytes(ids.tobytes())
        np.testing.assert_array_equal(windows_of(np.memmap(path, np.uint16, "r")), windows_of(ids))
        mapped = np.memmap(path, np.uint16, "r")
        (tmp_path / "other").write_bytes((ids + 1).tobytes())
        (tmp_path / "other").replace(path)
        np.testing.assert_array_equal(windows_of(mapped), windows_of(ids))


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_ids_edited_in_place(tmp_path, mode):
    path = tmp_path / "ids"
    path.write_bytes(IDS.tobytes())
    mapped = np.memmap(path, np.uint16, mode)
    np.testing.assert_array_equal(windows_of(mapped), windows_of(IDS))
    mapped[:] = IDS[::-1]
    np.testing.assert_array_equal(windows_of(mapped), windows_of(IDS[::-1]))


VIEWS = {
    "reversed": lambda ids: ids[::-1],
    "slice": lambda ids: ids[3:],
    "every other": lambda ids: ids[::2],
    "column": lambda ids: ids[:40].reshape(20, 2)[:, 1],
    "whole, as other type": lambda ids: ids.view(np.int16),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_a_memory_mapped_file(tmp_path, view):
    path = tmp_path / "ids"
    path.write_bytes(IDS.tobytes())
    mapped, sizes = np.memmap(path, np.uint16, "r"), {"context_length": 4, "batch_size": 1}
    for make in (evaluation_windows, stream_windows):
        received, expected = (make(view(ids), **sizes).take(3) for ids in (mapped, IDS))
        for (_, labels, *_), (_, expected_labels, *_) in zip(received, expected, strict=True):
            np.testing.assert_array_equal(labels, expected_labels)


def test_a_memory_mapped_file_is_not_read_into_memory(tmp_path):
    mapped = np.memmap(tmp_path / "ids", np.uint16, "w+", shape=1000)
    dataset = evaluation_windows(mapped, context_length=999, batch_size=1)
    mapped[:] = np.arange(1000)
    ((_, labels, _),) = dataset
    np.testing.assert_array_equal(labels[0], np.arange(1, 1000))


def test_training_needs_one_batch():
    with pytest.raises(ValueError, match="2 windows of 5, fewer than batch_size=3"):
        training_windows(IDS[:14], **KEYWORDS)


@pytest.mark.parametrize("length", [2, 5, 6, 12, 13, 14, 25, 26, 41])
def test_evaluation_predicts_every_id_but_the_first_once(length):
    ids = IDS[:length]
    inputs, labels, weights = [], [], []
    for features, label, weight in evaluation_windows(ids, context_length=4, batch_size=3):
        assert label.shape == weight.shape == (3, 4)
        kept = weight.numpy() == 1
        inputs += features["token_ids"].numpy()[kept].tolist()
        labels += label.numpy()[kept].tolist()
        weights += weight.numpy().ravel().tolist()
    assert inputs == ids[:-1].tolist()
    assert labels == ids[1:].tolist()
    assert set(weights) <= {0.0, 1.0}
    assert len(weights) == -(-(length - 1) // 12) * 12


def test_evaluation_has_static_shapes_and_a_known_number_of_batches():
    dataset = evaluation_windows(IDS, context_length=4, batch_size=3)
    ids = tf.TensorSpec((3, 4), tf.int32)
    expected = ({"token_ids": ids}, ids, tf.TensorSpec((3, 4), tf.float32))
    assert dataset.element_spec == expected
    assert int(dataset.cardinality()) == 4


def test_evaluation_needs_two_ids():
    with pytest.raises(ValueError, match="at least two token ids; received 1"):
        evaluation_windows(IDS[:1], context_length=4, batch_size=3)


def test_no_python_runs_in_the_threads_of_a_pipeline():
    # A thread that waits for Python while Python ends keeps the process from ending.
    for dataset in (
        training_windows(IDS, **KEYWORDS),
        evaluation_windows(IDS, context_length=4, batch_size=3),
    ):
        assert b"PyFunc" not in dataset._as_serialized_graph().numpy()


def test_a_stream_goes_on_and_sees_every_id_once():
    ids = np.arange(24, dtype=np.uint16)
    batches = list(stream_windows(ids, context_length=4, batch_size=2).take(5))
    inputs = np.stack([x["token_ids"] for x, _ in batches])
    labels = np.stack([y for _, y in batches])
    expected = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [12, *range(13, 24), 0]]
    for row, stream in enumerate(expected):
        assert inputs[:3, row].ravel().tolist() == stream[:-1]
        assert labels[:3, row].ravel().tolist() == stream[1:]
    # Row 1 has gone round the ring by now, and row 0 reads what row 1 began with.
    assert inputs[3:, 0].ravel().tolist() == inputs[:2, 1].ravel().tolist()
    assert inputs[3:, 1].ravel().tolist() == list(range(8))
    resumed = next(iter(stream_windows(ids, context_length=4, batch_size=2, start_step=3)))
    np.testing.assert_array_equal(resumed[0]["token_ids"], inputs[3])


def test_a_stream_needs_a_batch():
    with pytest.raises(ValueError, match="9 token ids are fewer than the 10"):
        stream_windows(np.arange(9), context_length=4, batch_size=2)


def test_no_autotuner_watches_the_windows():
    """Its thread can hold up the end of `fit` for as long as the iterator lived."""
    sizes = {"context_length": CONTEXT, "batch_size": BATCH}
    evaluated = evaluation_windows(IDS, **sizes)
    for dataset in (
        training_windows(IDS, **KEYWORDS),
        stream_windows(IDS, **sizes),
        evaluated,
        pack_windows(evaluated, evaluated),
    ):
        assert dataset.options().autotune.enabled is False
