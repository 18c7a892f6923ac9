"""No code from data: nothing that lies in a model, a store, an adapter, a dataset or a cache is run or imported.

Every command gets files that would leave a mark if they were run. ``tests/test_source_rules.py`` reads the sources.
"""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from runs import word_tokenizer

from mebp_triton.layers.lora_config import LoraConfig

QUICK = ["--max-steps=1", "--max-length=24", "--lora-r=2", "--device=cpu"]


@pytest.fixture
def canary(tmp_path):
    """Code that leaves a file when it is run; fails after a test that ran it."""
    mark = tmp_path / "it-was-run"
    yield f"open({str(mark)!r}, 'w').close()\n"
    assert not mark.exists(), "code from data was run"


def planted(directory, canary):
    """Fills ``directory`` with modules of every name that anything could look for."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "evil", "__init__", "generate", "data"):
        (directory / f"{name}.py").write_text(canary + "class Evil: pass\n")
    (directory / "custom_generate").mkdir(exist_ok=True)
    (directory / "custom_generate" / "generate.py").write_text(canary + "def generate(*a, **k): pass\n")
    return directory


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}


@pytest.mark.parametrize("known", [True, False], ids=["a known architecture", "an unknown one"])
def test_a_model_with_code_beside_it(mebp, world, canary, tmp_path, known):
    model = planted(Path(shutil.copytree(world / "model", tmp_path / "model")), canary)
    kind = {} if known else {"model_type": "evil", "architectures": ["Evil"]}
    change(model / "config.json", auto_map=AUTO_MAP, custom_pipelines={"x": {"impl": "evil.Evil"}}, **kind)
    change(model / "generation_config.json", auto_map=AUTO_MAP, custom_generate="evil")
    run = ["train", model, f"--train-file={world / 'data/train.txt'}", f"--output-dir={tmp_path / 'run'}", *QUICK]
    for arguments in (["quantize", model, tmp_path / "store"], ["plan", model, "--max-length=24"], run):
        code, _, err = mebp(*arguments)
        if known:
            assert code == 0, err
        else:
            assert code == 2 and "needs code from the checkpoint, which is never run" in err, err
    if known:
        assert "auto_map" not in json.loads((tmp_path / "store" / "config.json").read_text())
        assert not list((tmp_path / "store").rglob("*.py")), "the code was taken along"
        assert mebp("generate", tmp_path / "store", "--prompt=a dog", "--max-new-tokens=1")[0] == 0


def test_a_tokenizer_with_code_beside_it(mebp, world, canary, tmp_path):
    model = planted(Path(shutil.copytree(world / "model", tmp_path / "model")), canary)
    change(model / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")
    mebp("quantize", model, tmp_path / "store")
    code, _, err = mebp("generate", tmp_path / "store", "--prompt=a dog", "--max-new-tokens=1")
    assert code == 2 and "has no usable tokenizer" in err and len(err.strip().splitlines()) == 1, err


class Payload:
    """An object whose text is run when it is unpickled."""

    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return exec, (self.text,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights(mebp, world, canary, tmp_path, name):
    model = Path(shutil.copytree(world / "model", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Payload(canary)))
    code, _, err = mebp("quantize", model, tmp_path / "store")
    assert code == 2 and not (tmp_path / "store").exists()
    assert ("only pickled weights" if name.endswith(".bin") else "not a whole safetensors file") in err


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickled_adapter_and_one_that_names_a_library(mebp, world, canary, tmp_path, name, monkeypatch):
    adapter = planted(tmp_path, canary)
    monkeypatch.syspath_prepend(str(adapter))  # where an import of its library would find it
    mapping = {"base_model_class": "Evil", "parent_library": "modeling_evil"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "auto_mapping": mapping}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / name).write_bytes(pickle.dumps(Payload(canary)))
    code, _, err = mebp("merge", world / "store", tmp_path / "out", f"--adapter={adapter}")
    assert code == 2 and name in err, err


def test_a_dataset_with_a_loading_script(mebp, world, canary, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = planted(tmp_path / "data", canary) if (tmp_path / "data").mkdir() is None else None
    code, _, err = mebp("eval", world / "store", f"--validation-file={data}", "--max-length=24")
    assert code == 2 and "is a directory and no saved dataset" in err
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"text": "a dog sees the moon ."}]).save_to_disk(str(saved))
    planted(saved, canary)
    (saved / "saved.py").write_text(canary)
    change(saved / "dataset_info.json", builder_name="evil", dataset_name="evil", download_checksums={})
    assert mebp("eval", world / "store", f"--validation-file={saved}", "--max-length=24")[0] == 0
    info = json.loads((saved / "dataset_info.json").read_text())
    change(saved / "dataset_info.json", features=info["features"] | {"x": {"_type": "Evil", "dtype": "evil.Evil"}})
    code, _, err = mebp("eval", world / "store", f"--validation-file={saved}", "--max-length=24")
    assert code == 2 and "cannot be read as a saved dataset" in err


def test_a_pickle_among_the_checkpoints_files(mebp, world, canary, scripts, tmp_path):
    from world import TRAIN

    texts = [f"--train-file={world / 'data/train.txt'}", f"--validation-file={world / 'data/valid.txt'}"]
    for name in ("state.safetensors", "optimizer-00000.safetensors"):
        copy = Path(shutil.copytree(world / "run", tmp_path / f"bent-{name}"))
        (copy / "checkpoint" / name).write_bytes(pickle.dumps(Payload(canary)))
        code, _, err = mebp("train", world / "store", *texts, f"--output-dir={copy}", "--resume", *TRAIN)
        assert code == 2 and "is damaged" in err


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{% set x = cycler.__init__.__globals__.os.system('true') %}",
    "{{ lipsum.__globals__['os'].popen('true').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'evil.py' as evil %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(mebp, world, tmp_path, template):
    model = Path(shutil.copytree(world / "model", tmp_path / "model"))
    word_tokenizer(template).save_pretrained(model)
    assert mebp("quantize", model, tmp_path / "store")[0] == 0
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a dog"}]}) + "\n")
    code, _, err = mebp("eval", tmp_path / "store", f"--validation-file={tmp_path / 'chats.jsonl'}", "--max-length=24")
    assert code == 2 and "the chat template refuses the messages" in err, err
    code, _, err = mebp("generate", tmp_path / "store", "--prompt=a dog", "--chat", "--max-new-tokens=1")
    assert code == 2 and "the chat template refuses the prompt" in err, err


def test_settings_that_would_make_objects(mebp, world, canary, tmp_path):
    (tmp_path / "a.yaml").write_text(f"lora_r: !!python/object/apply:builtins.exec [{json.dumps(canary)}]\n")
    code, _, err = mebp("plan", world / "store", f"--config={tmp_path / 'a.yaml'}")
    assert code == 2 and "a.yaml is not valid YAML" in err


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "expression",
    [
        r"((\w|\w\w|\.)+)+[0-9]",
        r"(.|..)*[A-Z]",
        "(" * 3000 + ")" * 3000,
        "a" * (1 << 15),
        "a{1000000000}",
        "a{1000000000,}",
        f"a{{{'9' * 5000}}}",
        "((a{600}){600}){600}",
    ],
)
def test_an_expression_that_never_ends(key, expression, monkeypatch):
    """``re`` would match these for longer than anybody waits."""
    monkeypatch.setattr("mebp_triton.layers.lora_config.MATCH_SECONDS", 0.1)
    value = {expression: 2} if key.endswith("pattern") else expression
    config = LoraConfig(**({"target_modules": "all-linear"} | {key: value}))
    path = "model.layers.0.self_attn.q_proj_and_a_long_name_of_many_words_for_a_layer_of_the_decoder"
    with pytest.raises(ValueError, match="takes too long to match|is not a regular expression") as caught:
        config.targets(path)
        config.scaling(path)
    assert len(str(caught.value)) < 400


def test_what_is_cached_of_expressions_is_what_re_says():
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "model.embed_tokens"]
    for expression in (
        r".*\.(q|v)_proj",
        r"model\.layers\.\d+\..*",
        r"^(?!.*layers\.0).*proj$",
        r"(?i)MODEL.*_PROJ",
        r".*layers\.(?:1[0-9]|2[0-7])\..*(?:down|up)_proj",
        r"[^.]+",
        r"(?:model\.)?layers.*",
        r"model\.layers\.\d{1,3}\..{0,500}_proj",
        r".*\.[a-z]{2}\w{3}j",
    ):
        for path in paths:
            wanted = re.fullmatch(expression, path) is not None
            assert LoraConfig(target_modules=expression).targets(path) == wanted, (expression, path)
