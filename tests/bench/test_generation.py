"""The comparison of generating: what a command's first byte and its last line say, and ratios under the same load."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def generation(bench_path):
    import generation

    return generation


WAITS = """
import pathlib, sys, time
print("a", flush=True)
for _ in range(500):
    if pathlib.Path(sys.argv[1]).exists():
        break
    time.sleep(0.02)
else:
    print("nobody looked at the clock")
"""


def test_the_clock_is_read_at_the_first_byte_and_not_at_the_end(generation, monkeypatch, tmp_path):
    read, flag = [], tmp_path / "read"

    def clock():
        read.append(None)
        if len(read) == 2:
            flag.touch()
        return float(len(read))

    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=clock))
    assert generation.timed(["-S", "-c", WAITS, str(flag)]) == (1.0, "a\n", "")


def test_a_command_that_fails_is_an_error_with_its_words(generation):
    with pytest.raises(RuntimeError, match="ended with 3: no model"):
        generation.timed(["-S", "-c", "import os, sys; print('a'); sys.stderr.write('no model'); sys.exit(3)"])
    with pytest.raises(RuntimeError, match="ended with 0"):
        generation.timed(["-S", "-c", "pass"])


def test_a_run_of_fewer_tokens_than_asked_is_refused(generation, monkeypatch, tmp_path):
    line = "7 tokens: the first after 0.10 s, then 30.1 tokens/s; cut off at --max-new-tokens\n"
    monkeypatch.setattr(generation, "timed", lambda command: (1.5, "text\n", line))
    found = generation.run_ours(tmp_path, 7)
    assert found == {"first_seconds": 1.5, "tokens_per_second": 30.1, "text": "text"}
    with pytest.raises(RuntimeError, match="not 8 tokens"):
        generation.run_ours(tmp_path, 8)


def test_sides_are_compared_to_ours_under_the_same_load(generation):
    def runs(*speeds):
        return [{"tokens_per_second": speed, "first_seconds": 1.0, "text": "t"} for speed in speeds]

    results = {"mebp": runs(20.0, 30.0), "mebp beside 2": runs(9.0, 9.0)}
    results |= {"llama.cpp": runs(40.0, 40.0), "llama.cpp beside 2": runs(3.0, 4.5)}
    table = generation.summarize(results)
    assert table["llama.cpp"]["our_speed_to_its"]["rounds"] == [0.5, 0.75]
    assert table["llama.cpp beside 2"]["our_speed_to_its"]["rounds"] == [3.0, 2.0]
    assert table["mebp beside 2"]["our_speed_to_its"]["rounds"] == [1.0, 1.0]
