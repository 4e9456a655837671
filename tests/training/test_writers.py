"""TensorBoard files: what was written is read back from the event file."""

import io

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from unialign_jax.training import writers


def read_events(directory):
    """Events of the directory's files, by the TFRecord framing: length, its crc, the record, its crc."""
    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            record = data[12 : 12 + length]
            assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(record)
            events.append(Event.FromString(record))
            data = data[16 + length :]
    return events


def values(events):
    return {(event.step, value.tag): value for event in events for value in event.summary.value}


def test_scalars_images_and_texts_are_written(tmp_path):
    writer = writers.make_writer(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    writer.write_scalars(3, {"loss": np.float32(0.5), "throughput/images_per_second": 12})
    writer.write_images(3, {"grid": picture, "pair": np.stack([picture, 255 - picture])})
    writer.write_texts(4, {"caption": "a red ball"})
    writer.close()
    found = values(read_events(tmp_path))
    assert found[3, "loss"].simple_value == 0.5
    assert found[3, "throughput/images_per_second"].simple_value == 12
    for tag, expected in {"grid": picture, "pair/0": picture, "pair/1": 255 - picture}.items():
        decoded = np.asarray(Image.open(io.BytesIO(found[3, tag].image.encoded_image_string)))
        np.testing.assert_array_equal(decoded, expected)
    assert found[4, "caption/text_summary"].tensor.string_val == [b"a red ball"]


def test_a_resumed_run_drops_what_the_interrupted_one_wrote_later(tmp_path):
    writers.make_writer(tmp_path).close()
    writers.make_writer(tmp_path, start_step=20).close()
    starts = [event.step for event in read_events(tmp_path) if event.session_log.status == event.session_log.START]
    assert starts == [1, 21]  # a run that was killed before its first checkpoint starts at the beginning again


def test_only_one_process_writes(tmp_path):
    writer = writers.make_writer(tmp_path / "none", active=False)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "none").exists()


def test_errors_of_the_background_thread_surface(tmp_path):
    writer = writers.make_writer(tmp_path)
    with pytest.raises(Exception, match="no number"):
        writer.write_scalars(1, {"loss": "no number"})
        writer.flush()
