import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.encoding import Encoded, EncodedBatch, TextBatch
from fastgpt.data.worker import receive, receive_encoded, send_encoded, send_text
from fastgpt.data.workers import close, encode_in
from fastgpt.errors import UserError

texts = st.lists(st.text(), max_size=4)


@given(train=texts, validation=texts)
def test_a_batch_of_text_arrives_as_it_was_sent(train: list[str], validation: list[str]) -> None:
    pipe = io.BytesIO()
    send_text(pipe, TextBatch(train, validation))
    pipe.seek(0)
    message = receive(pipe)
    assert message is not None and TextBatch(*message[0]) == (train, validation)
    assert receive(pipe) is None


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_batch_of_tokens_arrives_as_it_was_sent(dtype: str) -> None:
    ids = np.array([0, 1, 65535, 7], dtype)
    batch = EncodedBatch(Encoded(ids, np.array([1, 3]), 12), Encoded(ids[:0], np.array([], np.int64), 0))
    pipe = io.BytesIO()
    send_encoded(pipe, batch)
    pipe.seek(0)
    for sent, received in zip(batch, receive_encoded(pipe, dtype), strict=True):
        np.testing.assert_array_equal(received.ids, sent.ids, strict=True)
        np.testing.assert_array_equal(received.lengths, sent.lengths, strict=True)
        assert received.bytes == sent.bytes


def test_a_message_that_is_cut_is_no_message() -> None:
    pipe = io.BytesIO()
    send_text(pipe, TextBatch(["some text"], []))
    for size in range(len(pipe.getvalue())):
        assert receive(io.BytesIO(pipe.getvalue()[:size])) is None


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(3)",
        "import sys; sys.stdin.buffer.read(1_000_000); sys.exit(3)",
        "print('half'); raise SystemExit(3)",
    ],
)
def test_a_worker_that_ends_at_any_moment_is_reported(program: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with pytest.raises(UserError, match=r"a worker process died \(exit code 3\)"):
        encode_in(process, TextBatch(["x" * 1_000_000], []), "uint16")
    close(process)
