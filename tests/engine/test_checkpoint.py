"""Where a checkpoint is looked for, and what stands on the streams while it is read."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from engine import LLM
from engine.checkpoint import read_checkpoint
from engine.config import EngineConfig
from engine.errors import BadConfig
from tests.engine.pictures import GREEDY, token_ids
from tests.engine.tiny_llava import write_tiny_text

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

LOAD_WITHOUT_NETWORK = """
import atexit, gc, os, socket, sys

gc.disable()  # as `cli.garbage`: a third of what such a process costs
atexit.register(gc.freeze)

def refuse(*_, **__):
    os.write(2, b"the network was asked\\n")
    os._exit(9)

socket.getaddrinfo = socket.create_connection = refuse

from engine import LLM
from engine.errors import BadConfig

for model in sys.argv[1:]:
    try:
        LLM(model).close()
    except BadConfig as error:
        print(error)
"""


@pytest.fixture
def cache(tmp_path: Path, tiny_folder: Path) -> Path:
    """A hub's cache, as `hf download org/tiny` leaves it."""
    model = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_folder, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def load(*models: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Load models in a process that may use the network as far as its settings say."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_NETWORK, *models],
        env=env | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_model_in_the_cache_is_loaded_without_the_network_and_in_silence(cache: Path) -> None:
    run = load("org/tiny", cache=cache)

    assert (0, "", "") == (run.returncode, run.stdout, run.stderr)


def test_model_that_is_not_in_the_cache_is_told_with_the_way_to_get_it(cache: Path) -> None:
    run = load("org/other", cache=cache)

    assert (0, "") == (run.returncode, run.stderr)
    assert (
        "The model 'org/other' cannot be loaded: there is no such folder, and it is not in the "
        "hub's cache. Fetch it with `hf download org/other`.\n"
    ) == run.stdout


def test_model_that_is_in_the_cache_in_part_is_told_with_the_way_to_get_it(cache: Path) -> None:
    (cache / "models--org--tiny" / "snapshots" / COMMIT / "model.safetensors").unlink()

    run = load("org/tiny", cache=cache)

    assert (0, "") == (run.returncode, run.stderr)
    assert run.stdout.endswith("Fetch all of it with `hf download org/tiny`.\n")


Change = Callable[[Path], object]


def write(name: str, content: object) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def update(name: str, **values: object) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return apply


def replace_by_folder(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


ODD: dict[str, Change] = {
    "a text for another part": update("config.json", text_config="none"),
    "a text for a part": update("config.json", vision_config="none"),
    "a list for a number": update("config.json", image_token_id=[]),
    "a dtype of nobody's": update("config.json", dtype="float7"),
    "no list of special ids": update("generation_config.json", eos_token_id={"a": 1}),
    "a text for a size": update("preprocessor_config.json", min_pixels="none", size="none"),
    "a number for a mean": update("preprocessor_config.json", image_mean=1),
    "a mean of one": update("preprocessor_config.json", image_mean=[0.5]),
    "another tokenizer.json": write("tokenizer.json", {"model": 1}),
    "a list for a tokenizer": write("tokenizer.json", []),
    "a list for its settings": write("tokenizer_config.json", []),
    "a folder for a config": replace_by_folder("config.json"),
    "no text": lambda folder: (folder / "generation_config.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_checkpoint_is_one_line(tiny_folder: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    ODD[what](folder)

    with pytest.raises(BadConfig) as caught:
        LLM(str(folder))

    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


# --- what ends an output -------------------------------------------------------------------------------

TEXT_END, TURN_END = (f"<|{name}|>" for name in ("endoftext", "im_end"))
OTHER = 7  # any token's id
ENDS: dict[str, tuple[object, object, object, list[object]]] = {
    "generation_config.json and the tokenizer": (TEXT_END, None, None, [TEXT_END, TURN_END]),
    "a list in config.json alone": (None, [TEXT_END, OTHER], None, [TEXT_END, OTHER, TURN_END]),
    "another in each": (OTHER, TEXT_END, 8, [OTHER, TEXT_END, 8, TURN_END]),
    "a null in a list": ([None, OTHER], None, None, [OTHER, TURN_END]),
    "the tokenizer alone": (None, None, None, [TURN_END]),
}


def write_ends(folder: Path, generation: object, top: object, text: object) -> None:
    """Tokens by their names or ids, as two configs and the part for text name them; None: nothing."""
    read_ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids

    def named(value: object) -> object:
        if isinstance(value, list):
            return [named(each) for each in value]
        return read_ids(value) if isinstance(value, str) else value

    config = json.loads((folder / "config.json").read_text())
    text_config = config["text_config"] | {"eos_token_id": named(text)}
    update("config.json", eos_token_id=named(top), text_config=text_config)(folder)
    update("generation_config.json", eos_token_id=named(generation))(folder)


@pytest.mark.parametrize("what", ENDS)
def test_output_ends_at_whatever_a_file_names(tiny_folder: Path, tmp_path: Path, what: str) -> None:
    *said, expected = ENDS[what]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    write_ends(folder, *said)

    checkpoint = read_checkpoint(EngineConfig(str(folder), device="cpu"))

    ids = checkpoint.eos_token_ids
    read_ids = checkpoint.tokenizer.convert_tokens_to_ids
    assert [read_ids(end) if isinstance(end, str) else end for end in expected] == list(ids)


def test_end_that_transformers_assumes_is_none(tmp_path: Path) -> None:
    """Llama's configs assume 2, which in the vocabulary of another Llama is a word."""
    write_tiny_text(tmp_path, changes={"text": {"model_type": "llama"}})
    update("tokenizer_config.json", **{"eos_token": "<pad>"})(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    write("config.json", config)(tmp_path)

    checkpoint = read_checkpoint(EngineConfig(str(tmp_path), device="cpu"))

    assert 2 == checkpoint.config.eos_token_id
    assert (checkpoint.tokenizer.eos_token_id,) == checkpoint.eos_token_ids


@pytest.mark.parametrize("end", ["2", 2.0, True, -1, {"a": 1}, [2, "5"], [[2]]])
def test_end_that_is_no_id_is_told(tiny_folder: Path, tmp_path: Path, end: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    update("generation_config.json", eos_token_id=end)(folder)

    with pytest.raises(BadConfig, match=r"generation_config\.json has an eos_token_id that is no"):
        LLM(str(folder))


# --- what cannot start ---------------------------------------------------------------------------------


def split_weights(folder: Path) -> list[Path]:
    """The weights as hubs store large ones: in two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    files = sorted(set(where.values()))
    for file in files:
        of_file = {name: weight for name, weight in weights.items() if where[name] == file}
        save_file(of_file, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in files]


def cut_a_shard(folder: Path) -> None:
    shard = split_weights(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    split_weights(folder)[1].unlink()


def write_adapter(folder: Path, *removed: str) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in removed:
        (folder / name).unlink()


CANNOT_START: dict[str, tuple[Change, dict[str, object], str]] = {
    "a model of nobody's": (
        update("config.json", model_type="bert"),
        {},
        "The model type 'bert' has no adapter, so it cannot run. There are adapters for ",
    ),
    "an adapter beside the weights": (
        lambda folder: write_adapter(folder),
        {},
        "has a LoRA adapter in its folder (adapter_config.json), which would not be applied. Merge",
    ),
    "an adapter in the place of a model": (
        lambda folder: write_adapter(folder, "config.json", "model.safetensors"),
        {},
        "has a LoRA adapter in its folder (adapter_config.json), which would not be applied. Merge",
    ),
    "a shard that is cut short": (cut_a_shard, {}, "it has no weights in safetensors that fit"),
    "a shard that is missing": (lose_a_shard, {}, "it has no weights in safetensors that fit"),
    "no processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        {},
        "The model has no preprocessor_config.json, so its pictures have no size.",
    ),
    "no chat template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        {"needs_chat_template": True},
        "has no chat template. Give one as chat_template=, a text or a file (--chat-template FILE).",
    ),
    "a template that is no file": (
        lambda folder: None,
        {"chat_template": "/nowhere/template.jinja"},
        "chat_template is neither a template (it holds no '{') nor a file that can be read.",
    ),
    "a revision of a folder": (
        lambda folder: None,
        {"revision": "v2"},
        "revision='v2' names a state of a model on the hub, and ",
    ),
    "code for a tokenizer": (
        update("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]}),
        {},
        "brings code of its own for its tokenizer. It runs only with trust_remote_code=True",
    ),
}


QUANTISED: dict[str, dict[str, object]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "by a method without a name": {"load_in_8bit": True},
}
for method, words in QUANTISED.items():
    CANNOT_START[f"quantised: {method}"] = (
        update("config.json", quantization_config=words),
        {},
        f"was quantised beforehand ({method}), which is not supported. Give its weights in bfloat16",
    )


@pytest.mark.parametrize("what", CANNOT_START)
def test_what_cannot_start_is_one_line_and_leaves_nothing_running(
    tiny_folder: Path, tmp_path: Path, what: str
) -> None:
    change, words, message = CANNOT_START[what]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change(folder)
    threads = set(threading.enumerate())

    with pytest.raises(BadConfig) as caught:
        LLM(str(folder), **words)  # type: ignore[arg-type]

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert threads >= set(threading.enumerate())


def reweigh(change: Callable[[dict[str, torch.Tensor], str], object]) -> Change:
    """Change the weights, given the name of one of the last layer's."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights, max(name for name in weights if name.endswith(".down_proj.weight")))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def lose_a_layer(part: str, depth: str) -> Change:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[part][depth] -= 1
        config["text_config"].pop("layer_types", None)
        write("config.json", config)(folder)

    return apply


OTHER_WEIGHTS: dict[str, tuple[Change, str]] = {
    "one is missing": (
        reweigh(lambda weights, name: weights.pop(name)),
        " lacks 1 of its weights, ",
    ),
    "one has another shape": (
        reweigh(lambda weights, name: weights.update({name: weights[name][1:].clone()})),
        " has no weights in safetensors that fit its config ",
    ),
    "one has no place": (
        reweigh(
            lambda weights, name: weights.update({name[:-6] + "bias": weights[name][0].clone()})
        ),
        " has 1 weights of layers for which its config.json has no place, ",
    ),
    "a layer too many for text": (
        lose_a_layer("text_config", "num_hidden_layers"),
        " weights of layers for which its config.json has no place, model.language_model.layers.1.",
    ),
    "a layer too many for pictures": (
        lose_a_layer("vision_config", "depth"),
        " weights of layers for which its config.json has no place, model.visual.blocks.1.",
    ),
}


def test_weights_that_do_not_fit_are_told_in_one_line_each(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """And in no more on the streams: transformers would write a table beside it."""
    folders = []
    for number, (change, _) in enumerate(OTHER_WEIGHTS.values()):
        folders.append(tmp_path / str(number))
        shutil.copytree(tiny_folder, folders[-1])
        change(folders[-1])

    run = load(*map(str, folders), cache=tmp_path)

    assert (0, "") == (run.returncode, run.stderr)
    for (_, message), line in zip(OTHER_WEIGHTS.values(), run.stdout.splitlines(), strict=True):
        assert message in line


def test_frequencies_beside_the_weights_of_layers_are_nobodys(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Published checkpoints of the first Llamas and of LLaVA-1.5's time have them."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    name = "model.language_model.layers.0.self_attn.rotary_emb.inv_freq"
    reweigh(lambda weights, _: weights.update({name: torch.ones(4)}))(folder)

    with LLM(str(folder)) as llm:
        assert token_ids(llm.generate("a", GREEDY, use_tqdm=False))


def test_model_in_several_files_answers_as_in_one(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    split_weights(folder)

    texts = []
    for place in (tiny_folder, folder):
        with LLM(str(place)) as llm:
            texts.append(token_ids(llm.generate("What is this?", GREEDY, use_tqdm=False)))

    assert texts[0] == texts[1]


def test_revision_picks_the_snapshot_and_stands_in_each_result(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model = cache / "models--org--tiny"
    other = COMMIT[::-1]
    shutil.copytree(model / "snapshots" / COMMIT, model / "snapshots" / other)
    (model / "refs" / "v2").write_text(other)

    stamps = []
    for revision in (None, "v2", COMMIT):
        with LLM("org/tiny", revision=revision) as llm:
            (result,) = llm.generate("a", GREEDY, use_tqdm=False)
            assert result.stamp is not None
            stamps.append(result.stamp.revision)

    assert [COMMIT, other, COMMIT] == stamps
    with pytest.raises(BadConfig) as caught:
        LLM("org/tiny", revision="v3")
    assert str(caught.value).endswith("Fetch it with `hf download org/tiny --revision v3`.")


def test_revision_is_the_models_and_no_tokenizers(
    cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    shutil.copytree(cache / "models--org--tiny", cache / "models--org--words")
    for model, name in (("tiny", "v2"), ("words", "main")):
        (cache / f"models--org--{model}" / "refs" / name).write_text(COMMIT)
    (cache / "models--org--tiny" / "refs" / "main").unlink()

    for tokenizer in (str(tiny_folder), "org/words", "org/tiny"):
        checkpoint = read_checkpoint(EngineConfig("org/tiny", tokenizer, "v2", device="cpu"))
        assert COMMIT == checkpoint.revision
