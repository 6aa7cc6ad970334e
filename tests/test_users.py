"""Users with the folders that they have: each chats, generates and verifies through the command.

The folders are laid out as the releases are, tiny and with random weights, but for this: after the
prompt they write a thought, if they think, and an answer. So what a user sees is known."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from templates import CODER, THINKING_2507, template_of
from test_quantised import KINDS, quantised_folder

from qwen_nb import cli
from qwen_nb.embed import Embedder
from qwen_nb.inspect import packaged_model
from qwen_nb.to_gguf import save_gguf

transformers = pytest.importorskip("transformers")

THOUGHT, ANSWER = "Hm", "Blue"
SIZES = dict(
    vocab_size=458,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
DENSE = SIZES | dict(model_type="qwen3", head_dim=16, rope_theta=1e6)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MROPE = dict(mrope_section=[1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.25)
HYBRID = DENSE | dict(
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    rope_parameters=MROPE | dict(rope_theta=1e7, rope_type="default"),
)
FAR = dict(
    hc_count=4,
    hc_lowrank=8,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=16,
    indexer_budget=16,
    indexer_compress_ratio=4,
    ple_layer_ids=[1],
    ple_embed_dim=64,
    ngram_vocab_size_base=100,
    heads_per_ngram=2,
    make_ngram_vocab_size_divisible_by=16,
    split_ngram_parts=2,
    output_gate_type="sigmoid",
    eos_token_id=449,
)
TOWER = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    patch_size=4,
    out_hidden_size=64,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
)


def nested(kind, text):
    "As released: the text model's settings under text_config, a tower for pictures beside it."
    text = text | dict(model_type=f"{kind}_text")
    tower = TOWER | dict(model_type=kind)
    return dict(model_type=kind, text_config=text, vision_config=tower, tie_word_embeddings=False)


SEEING = DENSE | dict(rope_scaling=dict(mrope_section=[4, 2, 2], rope_type="default"))
# name → class, config, template, what it writes after "assistant\n" ("" the answer)
RELEASES = {
    "Qwen2-Instruct": ("Qwen2ForCausalLM", SIZES | dict(model_type="qwen2"), "qwen2", ""),
    "Qwen2.5-Coder": ("Qwen2ForCausalLM", SIZES | dict(model_type="qwen2"), "qwen2.5", ""),
    "Qwen3": ("Qwen3ForCausalLM", DENSE, "qwen3", "<think>"),
    "Thinking-2507": ("Qwen3ForCausalLM", DENSE, THINKING_2507, "opened"),
    "Instruct-2507": ("Qwen3ForCausalLM", DENSE, "qwen3-instruct-2507", ""),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM", DENSE | EXPERTS | dict(model_type="qwen3_moe"), "qwen3", "<think>",
    ),
    "Qwen3-Coder": (
        "Qwen3MoeForCausalLM", DENSE | EXPERTS | dict(model_type="qwen3_moe"), CODER, "",
    ),
    "Qwen3-VL": ("Qwen3VLForConditionalGeneration", nested("qwen3_vl", SEEING), "qwen3-vl", ""),
    "Qwen3.5-0.8B": (
        "Qwen3_5ForConditionalGeneration", nested("qwen3_5", HYBRID), "qwen3.5-nothink", "opened",
    ),
    "Qwen3.6-35B-A3B": (
        "Qwen3_5MoeForConditionalGeneration",
        nested("qwen3_5_moe", HYBRID | EXPERTS | dict(shared_expert_intermediate_size=32)),
        "qwen3.6", "opened",
    ),
    "Qwen3.8-Flash-Next": (
        "Qwen4ExpForConditionalGeneration",
        nested("qwen4_exp", HYBRID | EXPERTS | FAR | dict(shared_expert_intermediate_size=32)),
        "qwen3.8", "opened",
    ),
}  # fmt: skip


def words(folder):
    "The packaged tokenizer with one token more, of two line ends, which other text follows."
    raw = json.loads((packaged_model() / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["vocab"]["ĊĊ"] = len(raw["model"]["vocab"])
    for added in raw["added_tokens"]:
        added["id"] += 1
    raw["model"]["merges"].append(["Ċ", "Ċ"])
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return lambda text: fast.encode(text, add_special_tokens=False)


def follows(model, chains):
    "Let the model write each chain of ids when it has read its first one."
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        embedding.normal_()
        head.normal_(std=0.02)
        for before, after in {pair for c in chains for pair in zip(c, c[1:])}:
            head[after] += 4 * embedding[before] / embedding[before].norm()


def release(folder, name):
    "A folder like that release's."
    kind, raw, template, begins = RELEASES[name]
    template = template if "{" in template else template_of(template)
    folder.mkdir()
    ids, kind = words(folder), getattr(transformers, kind)
    about = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>")
    if "2" in name[:5]:
        about["chat_template"] = template  # where it stood in those years
    elif name == "Qwen3-VL":
        (folder / "chat_template.json").write_text(json.dumps(dict(chat_template=template)))
    else:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    model = kind(kind.config_class(**raw))
    answer = ids(ANSWER) + ids("<|im_end|>")
    thought = ids("<think>") * (begins == "<think>") + ids(THOUGHT) + ids("</think>")
    first = thought + ids("\n\n") if begins else answer
    follows(model, [ids("\n") + first, ids("\n\n") + answer])
    model.bfloat16().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw | dict(architectures=[kind.__name__])))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def qwen3(home):
    return release(home / "base", "Qwen3")


@pytest.fixture
def nb(capsys, monkeypatch):
    "The command without a process: (status, what it wrote, what it said, the prompts it read)."
    from qwen_nb import drafts, generation, thinking

    prompts, stream = [], generation.stream

    def logged(model, ids, *rest, **more):
        prompts.append(ids[0].tolist())
        return stream(model, ids, *rest, **more)

    monkeypatch.setattr(generation, "stream", logged)
    monkeypatch.setattr(thinking, "stream", logged)
    monkeypatch.setattr(drafts, "stream", logged)

    def call(*args, stdin=""):
        prompts.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as done:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return done.value.code, out, err, list(prompts)

    return call


def official(folder, messages, **said):
    "The prompt's ids by transformers, from the template that the folder has anywhere."
    from qwen_nb.prompt import folder_template

    fast = transformers.AutoTokenizer.from_pretrained(folder)
    fast.chat_template = folder_template(folder)
    more = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    return fast.apply_chat_template(messages, **more, **said)


def user_tries(nb, model, template_in, thought, shown):
    "Two questions, one question by generate, no chat, and the check. What each should give."
    asked = ["Why is the sky?", "And the sea?"]
    greedy = ["--model", model, "--greedy", "--max-new-tokens", "24"]
    status, out, err, prompts = nb("chat", *greedy, stdin="\n".join(asked) + "\n")
    turn = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}\n" if thought else f"{ANSWER}\n"
    assert (status, out) == (0, 2 * turn), err
    said = dict(role="assistant", content=ANSWER)
    said |= dict(reasoning_content=THOUGHT) if thought else {}
    history = [dict(role="user", content=asked[0]), said, dict(role="user", content=asked[1])]
    assert prompts == [official(template_in, history[:1]), official(template_in, history)]

    status, out, err, prompts = nb("generate", asked[0], "--chat", *greedy)
    assert (status, out) == (0, shown + ANSWER + "\n"), err
    assert prompts == [official(template_in, history[:1])]
    status, out, err, _ = nb("generate", "Sky\n\n", *greedy)
    assert status == 0 and out.startswith(ANSWER), err


@pytest.mark.parametrize("name", RELEASES)
def test_a_user_of_a_release(nb, tmp_path, name):
    folder, begins = release(tmp_path / name, name), RELEASES[name][3]
    thought = begins and name != "Qwen3.5-0.8B"  # which does not think unless it is asked to
    opening = dict(opened="<think>\n").get(begins, begins)
    shown = f"{opening}{THOUGHT}</think>\n\n" if thought else ""
    user_tries(nb, folder, folder, thought, shown)
    status, out, err, _ = nb("verify", folder)
    assert status == 0 and "✓ transformers: logits within" in out, out + err
    if name == "Qwen3.5-0.8B":
        options = ["--think", "--model", folder, "--greedy"]
        assert THOUGHT in nb("chat", *options, stdin="Why?\n")[1]


def fine_tune(folder, base):
    "Saved by torch.compile's model, with norms in float32."
    shutil.copytree(base, folder)
    stored = load_file(folder / "model.safetensors")
    own = {f"_orig_mod.{n}": t.float() if "norm" in n else t for n, t in stored.items()}
    save_file(own, folder / "model.safetensors")


def adapter(folder, base):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        folder
    )


OWN = {
    "fine-tune": fine_tune,
    "adapter": adapter,
    "FP8": lambda folder, base: quantised_folder(folder, base, *KINDS["fp8"]),
    "AWQ": lambda folder, base: quantised_folder(folder, base, *KINDS["awq"]),
    "x.gguf": lambda path, base: save_gguf(base, path, "Q8_0"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_user_of_other_files(nb, tmp_path, qwen3, name):
    OWN[name](tmp_path / name, qwen3)
    user_tries(nb, tmp_path / name, qwen3, True, f"<think>{THOUGHT}</think>\n\n")
    status, out, err, _ = nb("verify", tmp_path / name)
    if name == "adapter":
        assert status == 2 and "is an adapter" in err and err.count("\n") == 1, err
    else:
        assert status == 0 and "✓ transformers" in out, out + err


def test_an_adapter_s_own_template_and_a_base_that_is_gone(nb, tmp_path, qwen3):
    adapter(tmp_path / "a", qwen3)
    mine = template_of("qwen3").replace("<|im_start|>assistant", "<|im_start|>poet")
    (tmp_path / "a/chat_template.jinja").write_text(mine, encoding="utf-8")
    *_, prompts = nb("chat", "--model", tmp_path / "a", "--greedy", stdin="Why?\n")
    assert len(prompts) == 1 and prompts[0] != official(qwen3, [dict(role="user", content="Why?")])
    about = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for base, said in ((None, "does not say to which model"), (str(tmp_path / "b"), "no folder")):
        about["base_model_name_or_path"] = base
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(about))
        status, out, err, _ = nb("chat", "--model", tmp_path / "a", stdin="Why?\n")
        assert (status, out) == (2, "") and said in err and "Traceback" not in err, err


def test_a_user_of_an_embedder(nb, tmp_path, qwen3):
    "Names without `model.`: vectors as transformers has them; a word to whoever chats with it."
    folder = tmp_path / "Qwen3-Embedding"
    shutil.copytree(qwen3, folder)
    stored = load_file(folder / "model.safetensors")
    bare = {n.removeprefix("model."): t for n, t in stored.items() if n != "lm_head.weight"}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(DENSE | dict(tie_word_embeddings=True)))
    (folder / "config_sentence_transformers.json").write_text("{}")
    status, out, _, _ = nb("embed", "-", "--model", folder, "--query", "sky", stdin="a\nb\n")
    assert status == 0 and len(out.splitlines()) == 2
    assert nb("verify", folder)[0] == 0
    err = nb("chat", "--model", folder, "--max-new-tokens", "3", stdin="Why?\n")[2]
    assert "trained to compare texts" in err
    want = Embedder.from_pretrained(folder)(["the sky"])
    wrapped = {f"model.language_model.{n}": t for n, t in bare.items()}
    save_file(wrapped | {"model.visual.x": torch.ones(2)}, folder / "model.safetensors")
    assert torch.equal(Embedder.from_pretrained(folder)(["the sky"]), want)
    mixed = {n: t.float() if "norm" in n else t for n, t in bare.items()}
    save_file(mixed, folder / "model.safetensors")
    assert torch.equal(Embedder.from_pretrained(folder)(["the sky"]), want)


def test_a_user_whose_file_is_packed_another_way(nb, tmp_path, qwen3):
    folder = tmp_path / "4bit-mlx"
    shutil.copytree(qwen3, folder)
    stored, layer = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj"
    stored[f"{layer}.weight"] = torch.zeros(96, 8, dtype=torch.uint32)
    save_file(stored | {f"{layer}.biases": torch.ones(96, 1)}, folder / "model.safetensors")
    raw = DENSE | dict(quantization=dict(group_size=64, bits=4))
    (folder / "config.json").write_text(json.dumps(raw))
    for command in (["chat", "--model"], ["generate", "x", "--model"], ["verify"]):
        status, out, err, _ = nb(*command, folder, stdin="Why?\n")
        assert (status, out) == (2, "") and "MLX" in err and err.count("\n") == 1, err


def test_a_real_process(qwen3):
    "The same by pipes, as it is typed."
    command = [sys.executable, "-c", "from qwen_nb.cli import main; main()", "chat", "--greedy"]
    done = subprocess.run(
        [*command, "--model", str(qwen3), "--no-think"],
        input="Why?\n",
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n"), done.stderr
