"""``mebp doctor``: findings as JSON and as a table; see ``tests/cli/doctor`` for what it finds."""

import pytest
import torch
from commands import answer, assert_one_line


def test_findings(mebp, world, tmp_path):
    command = ["doctor", world / "store", f"--scratch-directory={tmp_path}"]
    value = answer(mebp(*command, "--json"))
    assert value["self_test"].startswith("int4 products passed") and value["store"].startswith(str(world / "store"))
    assert value["scratch_directory"].startswith(str(tmp_path))
    code, out, _ = mebp(*command)
    assert code == 0 and "self test" in out and torch.__version__.split("+")[0] in out
    hidden = [name for name in value if name.endswith(("_bytes", "_bytes_per_second"))]
    hidden += ["scratch_in_memory", "scratch_on_card"]
    assert len(hidden) > 4
    shown = [line.strip() for line in out.splitlines()]
    assert not any(line.startswith(name.replace("_", " ") + " ") for name in hidden for line in shown)
    advice = " ".join(out[out.index("\n- ") :].split()) if value["advice"] else ""
    assert all(line.split(":")[0] in advice for line in value["advice"] if "memory" not in line)
    code, _, err = mebp("doctor", tmp_path)
    assert code == 2 and "no manifest.json" in err


def test_without_a_store(mebp):
    value = answer(mebp("doctor", "--json"))
    assert value["self_test"].startswith("int4 products passed") and "store" not in value


@pytest.mark.parametrize("flag", ["--device=cpu", "--backend=panel"])
def test_what_only_the_gradients_take_is_refused_without_them(mebp, flag):
    assert_one_line(mebp("doctor", flag), "--device and --backend are for --gradients: add that, or leave them out")


@pytest.mark.parametrize("ok", [True, False, None])
def test_gradients_that_are_wrong_fail(mebp, monkeypatch, ok):
    rows = [{"what": "a layer's dx", "dtype": "float32", "relative": 0.5, "ok": ok, "reason": "because"}]
    monkeypatch.setattr("mebp_triton.training.gradient_check.run", lambda device, backend: rows)
    code, out, err = mebp("doctor", "--gradients", "--device=cpu", "--backend=panel")
    words = {True: "passed", False: "FAILED", None: "left out, no time"}
    assert "against float64: cpu, panel" in out and words[ok] in out and "5.0e-01" in out
    assert code == (1 if ok is False else 0)
    if ok is False:
        assert "1 of 1 checks failed, first a layer's dx in float32: training here would be wrong" in err
    value = mebp("doctor", "--gradients", "--device=cpu", "--json")
    assert f'"failed": {int(ok is False)}' in value[1]
