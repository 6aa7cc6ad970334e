"""The command as it is used: real processes, pipes, a pseudo-terminal with Ctrl-C and Ctrl-D, and
what is refused."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen_nb import cli
from qwen_nb.chat import Chat, Scripted
from qwen_nb.conversation import COMMANDS, EXAMPLE
from qwen_nb.conversation import talk as talk_with
from qwen_nb.files import DTYPE_NAMES as DTYPES
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.report_commands import EMBED_EXAMPLES
from qwen_nb.settings import last_model
from qwen_nb.terminal import SAMPLING, Screen
from qwen_nb.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
COMMAND = [sys.executable, "-c", "from qwen_nb.cli import main; main()"]
ENV = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "QWEN_NB_MODEL")} | dict(
    TERM="xterm", COLUMNS="100", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONIOENCODING="utf-8"
)


@pytest.fixture(scope="module", autouse=True)
def ctrl_c_is_heard():
    "A background job starts with SIGINT ignored, and its children would inherit that."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny Qwen2 checkpoints: `random` writes anything, `endless` writes ! for ever, `base` has no
    chat tokens."""
    made = {}
    for name in ("random", "endless", "base"):
        made[name] = folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=512,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.5,
                max_position_embeddings=100_000 if name == "endless" else 128,
                bos_token_id=448,
                eos_token_id=450,
            )
        )
        if name == "endless":
            torch.nn.init.zeros_(
                model.model.norm.weight
            )  # all logits equal: always the first token
        model.save_pretrained(folder)
        shutil.copy(packaged_model() / "tokenizer.json", folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        text.replace("<|im_start|>", "<|begin|>"), encoding="utf-8"
    )
    return made


def run(*args, stdin=None, **env):
    "(status, stdout, stderr) of a process."
    kind = dict(input=stdin) if stdin is not None else dict(stdin=subprocess.DEVNULL)
    done = subprocess.run(
        [*COMMAND, *map(str, args)], env=ENV | env, capture_output=True, timeout=300, **kind
    )
    return (
        done.returncode,
        done.stdout.decode().replace("\r\n", "\n"),
        done.stderr.decode().replace("\r\n", "\n"),
    )


def call(capsys, monkeypatch, *args, stdin=""):
    "The same without a process."
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return e.value.code, out, err


def refused(result, *words):
    status, out, err = result
    err = re.sub(
        r"[^\n]*\r", "", err
    )  # as a terminal shows it: a progress bar that is gone leaves nothing
    assert (
        status == 2
        and not out
        and len(err.strip().splitlines()) == 1
        and len(err) < 400
        and err.startswith("qwen-nb: ")
    ), result
    for word in words:
        assert str(word) in err, result


# ---- help


def test_help(capsys, monkeypatch):
    status, out, err = call(capsys, monkeypatch, "-h")
    assert (
        status == 0
        and not err
        and all(name in out for name in ("chat ", "generate ", "data ", "train ", "verify "))
    )
    for name in ("chat", "generate"):
        monkeypatch.setenv("COLUMNS", "80")
        status, out, _ = call(capsys, monkeypatch, name, "-h")
        assert (
            status == 0
            and "examples:" in out
            and "None" not in out
            and max(map(len, out.split("examples:")[0].splitlines())) <= 80
        )
        plain = " ".join(out.split())
        for option in (
            "--model",
            "--dtype",
            "--greedy",
            "--seed",
            "--max-new-tokens",
            *("--" + s.replace("_", "-") for s in SAMPLING),
        ):
            assert f" {option}" in plain.split("examples:")[0], option
        with pytest.raises(SystemExit) as e:
            cli.make_parser().parse_args([name, "--temperature", "1", "--greedy"])
        assert e.value.code == 2
    for dtype in DTYPES:
        assert cli.make_parser().parse_args(["chat", "--dtype", dtype]).dtype == dtype


def test_examples_of_the_help_are_commands():
    for line in "\n".join(
        (
            cli.GENERATE_EXAMPLES,
            cli.CHAT_EXAMPLES,
            cli.DATA_EXAMPLES,
            cli.TRAIN_EXAMPLES,
            EMBED_EXAMPLES,
        )
    ).splitlines():
        if "qwen-nb" not in line:
            continue
        words = shlex.split(re.split(r" \| | [<>] | # ", line[line.index("qwen-nb") :])[0])
        assert cli.parse(words[1:]).run.__name__ == f"run_{words[1]}"


def test_help_is_instant():
    code = """
import sys, qwen_nb.cli as c
try: c.main(['chat', '-h'])
except SystemExit: print(sorted(m.partition('.')[0] for m in sys.modules))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "'qwen_nb'" in out and not any(
        f"'{m}'" in out
        for m in ("torch", "numpy", "matplotlib", "tokenizers", "transformers", "huggingface_hub")
    )


# ---- generate


def test_generate(capsys, monkeypatch, folders):
    options = "--model", folders["random"], "--max-new-tokens", 20, "--temperature", 2
    go = lambda *a, **kw: call(capsys, monkeypatch, "generate", *a, **kw)
    status, out, err = go("Max", *options, "--seed", 1)
    assert status == 0 and not err and out.endswith("\n")
    assert go("Max", *options, "--seed", 1)[1] == out != go("Max", *options, "--seed", 2)[1]
    for stdin in ("Max", "Max\n"):
        assert (
            go(*options, "--seed", 1, stdin=stdin)[1]
            == go("-", *options, "--seed", 1, stdin=stdin)[1]
            == out
        )
    assert go(*options, "--seed", 1, stdin="Max\n\n")[1] != out
    assert go("Max", *options[:4], "--greedy")[0] == 0
    assert go("Max", *options, "--seed", 1, "--dtype", "float64")[0] == 0


def test_generate_writes_what_stream_yields(capsys, monkeypatch, folders):
    from qwen_nb.generation import stream
    from qwen_nb.model import Qwen

    model, tokenizer = (
        Qwen.from_pretrained(folders["random"]),
        Tokenizer.from_pretrained(folders["random"]),
    )
    settings = dict(
        temperature=1.5,
        top_k=200,
        top_p=0.99,
        min_p=1e-4,
        repetition_penalty=1.1,
        presence_penalty=0.1,
    )
    options = [x for k, v in settings.items() for x in ("--" + k.replace("_", "-"), v)]
    for text, special in (("Max<|im_end|>", False), ("Max<|im_end|>", True)):
        ids = torch.tensor([tokenizer.encode(text, allow_special=special)])
        want = "".join(stream(model, ids, 30, tokenizer, seed=3, **settings))
        got = call(
            capsys,
            monkeypatch,
            "generate",
            text,
            "--model",
            folders["random"],
            "--seed",
            3,
            "--max-new-tokens",
            30,
            *options,
            *["--allow-special"] * special,
        )[1]
        assert got == want + "\n" * (not want.endswith("\n"))
    assert (
        call(
            capsys,
            monkeypatch,
            "generate",
            "a",
            "--model",
            folders["endless"],
            "--max-new-tokens",
            7,
        )[1]
        == "!" * 7 + "\n"
    )
    assert (
        call(capsys, monkeypatch, "generate", "a", "--model", folders["endless"], "--stop", "!!!")[
            1
        ]
        == ""
    )
    assert len(call(capsys, monkeypatch, "generate", "a", "--model", folders["endless"])[1]) == 257


def test_generate_stop_knows_line_ends(capsys, monkeypatch):
    out = call(
        capsys,
        monkeypatch,
        "generate",
        "Max is in the kitchen.\nMax has the ball.\n",
        "--greedy",
        "--stop",
        r"\n",
        "--max-new-tokens",
        30,
    )[1]
    assert len(out.splitlines()) == 1


def test_a_reader_that_leaves():
    "A pipe that is closed early is no error."
    p = subprocess.Popen(
        [*COMMAND, "generate", "Max", "--temperature", "1", "--max-new-tokens", "200"],
        env=ENV,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    p.stdout.close()
    assert p.wait(300) == 141 and p.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that only one process gets")
def test_generate_stopped_by_ctrl_c(folders):
    p = subprocess.Popen(
        [*COMMAND, "generate", "a", "--model", folders["endless"], "--max-new-tokens", "90000"],
        env=ENV,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert p.stdout.read(3) == b"!!!"
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and re.fullmatch(rb"!*\n", out) and err == b"qwen-nb: stopped\n"


def test_refusals(capsys, monkeypatch, folders, tmp_path):
    go = lambda *a, **kw: call(capsys, monkeypatch, *a, **kw)
    model = "--model", folders["random"]
    refused(go("generate", ""), "empty")
    refused(go("generate", stdin=""), "empty")
    (tmp_path / "a file").write_text("")
    for command in (["generate", "Max", "--model"], ["chat", "--model"], ["verify"]):
        more = f"; qwen-nb {command[0]} -h says more"
        refused(go(*command, tmp_path / "none"), "there is no folder", tmp_path / "none", more)
        refused(go(*command, tmp_path), "there is no config.json in", "a file", more)
        refused(go(*command, tmp_path / "a file"), "is a file; expected the folder", more)
    refused(go("generate", "Max", *model, "--max-new-tokens", 0), "max_new_tokens", 0)
    refused(go("generate", "Max", *model, "--max-new-tokens", 500), "128 positions")
    refused(go("generate", "Max " * 200, *model), "128 positions")
    refused(go("generate", "Max", *model, "--stop", ""), "stop")
    refused(go("generate", "\udcff", *model), "UTF-8", "0xff")
    for command in (["generate", "Max"], ["chat"]):
        refused(go(*command, *model, "--temperature", -1), "temperature")
        refused(go(*command, *model, "--temperature", 1, "--top-p", 2), "top_p")
        refused(go(*command, *model, "--greedy", "--top-k", 5), "top_k", "temperature")
        status, out, err = go(*command, "--tempurature", 1)
        assert status == 2 and f"usage: qwen-nb {command[0]}" in err and "--tempurature" in err
        assert err.endswith(f"; qwen-nb {command[0]} -h says more\n")
    refused(go("generate", "Max", *model, "--seed", 2**64), "seed", 2**64, "64 bits")
    refused(go("verify", "--as", "Qwen/Qwen3-0.6"), "Qwen/Qwen3-0.6;", "Qwen/Qwen3-0.6B-Base")
    refused(go("chat", "--model", folders["base"]), folders["base"], "<|im_start|>", "generate")


def test_bytes_that_are_no_text(folders):
    refused(
        run("generate", "--model", folders["random"], stdin=b"Max \xff"),
        "UTF-8",
        "0xff",
        "4 characters",
    )
    assert run(
        "generate",
        "--model",
        folders["random"],
        stdin="Grüße 👋".encode(),
        PYTHONIOENCODING="ascii",
    )[0] in (0, 2)


def test_a_terminal_that_lacks_characters():
    "A check mark on a terminal that knows ASCII only."
    code = """
import qwen_nb.cli as c
import qwen_nb.report_commands as r; r.run_verify = lambda args: print('✓ ok') or 0
c.main(['verify'])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENV | dict(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "? ok\n", "")


# ---- data and train, as processes

TINY = [
    "hidden_size=32",
    "intermediate_size=48",
    "num_hidden_layers=2",
    "num_attention_heads=2",
    "num_key_value_heads=1",
    "head_dim=16",
    "seq_len=32",
    "batch_size=4",
    "lr=3e-3",
    "warmup=2",
    "log_every=1",
    "eval_every=6",
    "eval_batches=1",
    "sample=5",
    "peak_tflops=1",
]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "Prepared by the command, from a PDF that lies in a folder whose name has a blank."
    from qwen_nb.pages import world_pdf

    folder = tmp_path_factory.mktemp("my books")
    world_pdf(folder / "a book.pdf", 80)
    status, out, err = run(
        "data", folder / "a book.pdf", "--out", folder / "data", "--vocab-size", 300
    )
    assert status == 0 and "Traceback" not in err, err
    return folder / "data", out


def commands_in(out):
    "What a report says to type, each as a list of words."
    return [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  qwen-nb ")]


def test_from_a_pdf_to_a_model_that_answers(capsys, monkeypatch, book, tmp_path):
    folder, said = book
    index = json.loads((folder / "index.json").read_text())
    assert (
        index["vocab_size"] == 300
        and f"{index['parts']['train']['tokens']:,} tokens" in said
        and "held_out" in said
        and " is in the " in said
    )
    (words,) = commands_in(said)
    assert words[:2] == ["train", f"data={folder}"] and {
        "steps=1000",
        "batch_size=8",
        "max_position_embeddings=256",
    } <= {*words}  # answering takes many steps
    status, out, err = run(*words, *TINY[:-6], "steps=12", *TINY[-6:], f"out={tmp_path / 'out'}")
    assert (
        status == 0
        and "Step 12: loss" in out
        and "held-out" in out
        and "step 6: loss" in err
        and "Traceback" not in err
    ), err
    (words,) = commands_in(out)
    assert (
        words == ["chat", "--model", str(tmp_path / "out/final")]
        and "and ask, for example: " in out
    )
    question = re.search("for example: (.*)", out)[1]
    from qwen_nb.data import split_documents, world_stories
    from qwen_nb.documents import QUESTIONS, conversations

    assert question == conversations(split_documents(world_stories(80))["train"])[0][0][
        "content"
    ] and question[:4] in {q[:4] for q in QUESTIONS}
    assert call(capsys, monkeypatch, *words, "--max-new-tokens", 5, stdin=question)[0] == 0
    status, out, err = run("generate", "Max", *words[1:], "--max-new-tokens", 5)
    assert status == 0 and out.strip() and not err
    whole = out
    for command in ("generate", "chat"):  # the run's folder is enough
        status, out, err = run(
            command, "--model", tmp_path / "out", "--max-new-tokens", 5, stdin=b"Max"
        )
        assert status == 0 and out.strip()
        assert err.startswith(f"{tmp_path / 'out'} is a training run; its last model is "), err
        assert err.splitlines()[0].endswith(str(tmp_path / "out/final"))
        if command == "generate":
            assert out == whole


def fake_run(folder, *names):
    "A run's folder with models that are whole as far as checksums say."
    from qwen_nb.durable import write_folder

    folder.mkdir()
    for name in names:
        write_folder(folder / name, {"config.json": b"{}"})
    return folder


def test_the_last_model_of_a_run(tmp_path, capsys, monkeypatch):
    "`final`, else the newest checkpoint that is whole; by its number, not by the alphabet."
    names = "step-000200", "step-999000", "step-1000000"
    run_ = fake_run(tmp_path / "run", *names)
    (run_ / "step-1000200").mkdir()  # cut off while it was written
    (run_ / "step-1000400.new.tmp").mkdir()
    (run_ / "step-1000000x").mkdir()
    assert last_model(run_).name == "step-1000000"
    (run_ / "step-1000000/config.json").write_text("damaged")
    assert last_model(run_).name == "step-999000"
    assert last_model(fake_run(tmp_path / "ended", *names, "final")).name == "final"
    # a model is no run, and neither is any other folder
    assert last_model(packaged_model()) is None and last_model(tmp_path) is None
    status, out, err = call(capsys, monkeypatch, "generate", "Max", "--model", run_)
    assert status == 2 and "its last model is" in err and "step-999000" in err
    empty = fake_run(tmp_path / "empty")
    (empty / "log.jsonl").write_text("")
    for command in (["generate", "Max"], ["chat"], ["verify"]):
        option = [] if command == ["verify"] else ["--model"]
        refused(
            call(capsys, monkeypatch, *command, *option, empty),
            "without a whole model",
            f"qwen-nb train out={empty}",
        )
    half = fake_run(tmp_path / "half")
    (half / "step-000010").mkdir()
    refused(call(capsys, monkeypatch, "chat", "--model", half), "without a whole model")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run of two steps whose last model is a checkpoint: `final` is gone."
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ["train", f"out={folder}", *TINY, "seq_len=128", "eval_every=0", "steps=2"]
    status, out, err = run(*words)
    assert status == 0, err
    shutil.rmtree(folder / "final")
    return folder


def test_a_run_to_go_on_from(capsys, monkeypatch, stopped, tmp_path):
    "`init_from` takes a run's folder for its last model, also when a newer one has come since."
    from qwen_nb.durable import load_checkpoint

    told = f"{stopped} is a training run; its last model is {stopped / 'step-000002'}"
    words = ["seq_len=128", "batch_size=4", "peak_tflops=1"]
    words += [f"init_from={stopped}", f"out={tmp_path / 'next'}", "eval_every=0", "sample=0"]
    words += ["steps=2", "warmup=0", "lr=1e-9"]
    status, out, err = call(capsys, monkeypatch, "train", *words)
    assert status == 0 and err.count(told) == 1, err
    before, after = (
        load_checkpoint(folder)["weights"]
        for folder in (stopped / "step-000002", tmp_path / "next/step-000002")
    )
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    # the same command, after the first run has ended
    shutil.copytree(stopped / "step-000002", stopped / "final")
    shutil.rmtree(tmp_path / "next/final")
    status, again, err = call(capsys, monkeypatch, "train", *words)
    shutil.rmtree(stopped / "final")
    assert status == 0 and again == out and "holds this run" in err and told not in err, err


def test_a_run_whose_tokenizer_is_taken(capsys, monkeypatch, stopped, tmp_path):
    from qwen_nb.data import world_stories

    (tmp_path / "a.txt").write_text("* * *\n".join(world_stories(80)))
    words = ["data", tmp_path / "a.txt", "--out", tmp_path / "data", "--tokenizer", stopped]
    status, said, err = call(capsys, monkeypatch, *words)
    last = stopped / "step-000002"
    assert status == 0, err
    assert err.startswith(f"{stopped} is a training run; its last model is {last}\n"), err
    (words,) = commands_in(said)
    assert f"init_from={last}" in words, "the next command does not go on from that model"


def test_a_run_that_is_verified(capsys, monkeypatch, stopped):
    status, out, err = call(capsys, monkeypatch, "verify", stopped)
    assert status == 0 and "✓" in out and "its last model is" in err, out + err


def test_the_share_of_the_text_that_is_held_out(capsys, tmp_path):
    from qwen_nb.commands import report_parts

    part = dict(documents=3, tokens=100, shards=[{}])
    index = dict(parts=dict(train=part, held_out=part), vocab_size=300)
    report_parts(tmp_path, index)
    assert "%" not in capsys.readouterr().out
    report_parts(tmp_path, index | dict(held_out_share=0.1234))
    assert "Held out, to measure on: 12.3% of the text." in capsys.readouterr().out


def test_no_questions(capsys, monkeypatch, tmp_path):
    "Switched off: documents alone, and a model that writes on."
    from qwen_nb.data import world_stories
    from qwen_nb.shards import Shards

    (tmp_path / "a.txt").write_text("* * *\n".join(world_stories(80)))
    status, said, err = call(
        capsys,
        monkeypatch,
        "data",
        tmp_path / "a.txt",
        "--out",
        tmp_path / "data",
        "--vocab-size",
        300,
        "--no-questions",
    )
    assert (
        status == 0
        and "conversation" not in said
        and sum(Shards(tmp_path / "data", p).documents for p in ("train", "held_out")) == 80
    )
    status, out, err = call(
        capsys,
        monkeypatch,
        "train",
        f"data={tmp_path / 'data'}",
        *TINY,
        "steps=2",
        f"out={tmp_path / 'out'}",
    )
    assert (
        "steps=100" in commands_in(said)[0] and "batch_size" not in said
    )  # the small book is not read hundreds of times
    (words,) = commands_in(out)
    assert (
        status == 0
        and words[0] == "generate"
        and words[-1] == str(tmp_path / "out/final")
        and "for example" not in out
    )
    assert "still rising" in out and "warmup=0" in out


def test_data_for_a_model_that_is_there(capsys, monkeypatch, tmp_path):
    """With the tokenizer of a whole model, the line to type next goes on from its weights; it is
    typed here, for two steps."""
    from qwen_nb.data import world_stories

    (tmp_path / "a.txt").write_text("* * *\n".join(world_stories(80)))
    shutil.copytree(packaged_model("qwen2"), model := tmp_path / "my model")
    status, said, err = call(
        capsys,
        monkeypatch,
        "data",
        tmp_path / "a.txt",
        "--out",
        tmp_path / "data",
        "--tokenizer",
        model,
    )
    (words,) = commands_in(said)
    assert (
        status == 0
        and words[:4] == ["train", f"data={tmp_path / 'data'}", f"init_from={model}", "lr=5e-5"]
        and "goes on from the weights" in said
    )
    words = [w for w in words if not w.startswith(("steps=", "warmup="))] + [
        "steps=2",
        "warmup=0",
        "lr=1e-9",
        f"out={tmp_path / 'out'}",
    ]
    assert call(capsys, monkeypatch, *words)[0] == 0
    before, after = (
        Qwen.from_pretrained(f, torch.float32) for f in (model, tmp_path / "out/step-000002")
    )
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(before.parameters(), after.parameters())
    )
    (model / "config.json").unlink()  # a tokenizer alone
    status, said, err = call(
        capsys,
        monkeypatch,
        "data",
        tmp_path / "a.txt",
        "--out",
        tmp_path / "data",
        "--tokenizer",
        model,
    )
    assert status == 0 and "init_from" not in said


def test_the_made_up_world_by_default(capsys, monkeypatch, tmp_path):
    "Data without a source; a run without data, which ends with a chat."
    status, out, err = call(
        capsys, monkeypatch, "data", "--out", tmp_path / "data", "--vocab-size", 280
    )
    assert (
        status == 0
        and (tmp_path / "data/world.pdf").is_file()
        and commands_in(out)[0][:2] == ["train", f"data={tmp_path / 'data'}"]
    )
    assert (
        call(capsys, monkeypatch, "data", "--out", tmp_path / "data", "--vocab-size", 290)[0] == 0
    )  # once more into its own folder
    status, out, err = call(
        capsys,
        monkeypatch,
        "train",
        f"out={tmp_path / 'out'}",
        *TINY,
        "seq_len=256",
        "steps=2",
        "batch_size=2",
    )
    assert status == 0 and commands_in(out) == [["chat", "--model", str(tmp_path / "out/final")]], (
        err
    )
    # It is shorter than its lessons: said before it begins, and at the end nothing else is blamed.
    assert err.index("ends inside its lessons") < err.index("step 1: loss"), err
    assert "inside its lessons" in out and "by heart" not in out
    (line,) = (line for line in err.splitlines() if "step 2: loss" in line)
    for part in ("held-out ", "floor 0.", "lr ", " tokens/s", "it learns lists", "need not fall"):
        assert part in line, (part, line)
    assert re.search(r"Where is \w+\?.*\((right|wrong: .*)\)$", line), line
    assert (
        call(capsys, monkeypatch, *commands_in(out)[0], "--max-new-tokens", 2, stdin="Hello")[0]
        == 0
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that only one process gets")
def test_ctrl_c_and_on(capsys, monkeypatch, book, tmp_path):
    """A run that was stopped says how to go on, goes on, and comes to the same losses as one that
    was not."""
    from qwen_nb.log import read_log

    words = ["train", f"data={book[0]}", *TINY, "steps=40", "save_every=5"]
    p = subprocess.Popen(
        [*COMMAND, *words, f"out={tmp_path / 'a'}"],
        env=ENV,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    end = time.time() + 200
    while not (tmp_path / "a/step-000005").is_dir():
        assert time.time() < end and p.poll() is None
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=100)
    last = err.decode().strip().splitlines()[-1]
    assert p.returncode == 130 and not out and b"Traceback" not in err
    safe = re.fullmatch(
        r"qwen-nb: stopped; the checkpoint (.*) is safe: the same command goes on from there", last
    )[1]
    assert safe.startswith(str(tmp_path / "a/step-0000")) and safe < str(tmp_path / "a/step-000040")
    assert (
        int(safe[-6:]) == read_log(tmp_path / "a")[-1]["step"]
    )  # the step at which it was stopped is saved
    status, out, err = run(*words, f"out={tmp_path / 'a'}")
    assert status == 0 and f"going on from {safe}" in err and "Step 40" in out
    status, again, err = call(capsys, monkeypatch, *words, f"out={tmp_path / 'a'}")
    assert status == 0 and again == out and "it is done: 40 steps" in err
    assert run(*words, f"out={tmp_path / 'b'}")[0] == 0
    a, b = ([(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in "ab")
    assert a == b and len(a) == 40


@pytest.mark.skipif(os.name == "nt", reason="gloo needs a system with fork")
def test_under_torchrun(book, tmp_path):
    "Two processes come to the losses of one, and one of them reports."
    pytest.importorskip("qwen_nb.parallel")
    from qwen_nb.log import read_log

    words = ["train", f"data={book[0]}", *TINY, "steps=4", "eval_every=0"]
    env = ENV | dict(CUDA_VISIBLE_DEVICES="")
    (tmp_path / "go.py").write_text("from qwen_nb.cli import main; main()")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            tmp_path / "go.py",
            *words,
            f"out={tmp_path / 'two'}",
            "--engine",
            "fsdp",
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 0
        and done.stdout.count("Step 4: loss") == 1
        and (tmp_path / "two/final/model.safetensors").is_file()
    ), done.stderr
    assert run(*words, f"out={tmp_path / 'one'}", CUDA_VISIBLE_DEVICES="")[0] == 0
    one, two = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4) and len(one) == 4


def test_refused_data(capsys, monkeypatch, tmp_path):
    from qwen_nb.pages import write_pdf

    go = lambda *a: call(capsys, monkeypatch, "data", *a)
    refused(go(tmp_path / "no.pdf"), "no.pdf", "there is no file or folder")
    refused(
        go(write_pdf(tmp_path / "scan.pdf", [[], []]), "--out", tmp_path / "new"), "scan.pdf", "OCR"
    )
    (tmp_path / "a.txt").write_text("One.\n* * *\nTwo.\n")
    (tmp_path / "half.pdf").write_bytes((tmp_path / "scan.pdf").read_bytes()[:400])
    refused(go(tmp_path / "half.pdf", "--out", tmp_path / "new"), "half.pdf is damaged")
    (tmp_path / "sheet.xls").write_text("1")
    refused(go(tmp_path / "sheet.xls", "--out", tmp_path / "new"), ".xls", ".pdf")
    refused(
        go(tmp_path / "a.txt", "--out", tmp_path),
        "something that is no prepared data",
        "a.txt",
        "--out",
    )
    refused(go(tmp_path / "a.txt", "--out", tmp_path / "a.txt"), "is a file")
    refused(
        go(tmp_path / "a.txt", "--out", tmp_path / "new", "--vocab-size", 100),
        "vocab_size is 100",
        256,
    )
    refused(go(tmp_path / "a.txt", "--out", tmp_path / "new", "--held-out", 2), "held_out is 2")
    refused(
        go(tmp_path / "a.txt", "--out", tmp_path / "new", "--mark", "no such line"), "one document"
    )
    refused(
        go(tmp_path / "a.txt", "--out", tmp_path / "new", "--tokenizer", tmp_path / "none"),
        tmp_path / "none",
    )
    refused(
        go(tmp_path / "a.txt", "--out", tmp_path / "new", "--tokenizer", tmp_path / "none"),
        "; qwen-nb data -h says more",
    )
    (tmp_path / "nothing").mkdir()
    refused(go(tmp_path / "nothing", "--out", tmp_path / "new"), "no document", "-h says more")
    assert (
        not (tmp_path / "new").exists()
        and (tmp_path / "a.txt").read_text() == "One.\n* * *\nTwo.\n"
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/index.json").write_text("{}")
    refused(go(tmp_path / "a.txt", "--out", tmp_path / "theirs"), "index.json")
    for at_most in (0, -5):
        refused(
            go(tmp_path / "a.txt", "--out", tmp_path / "new", "--at-most", at_most),
            "at_most",
            at_most,
        )


def test_refused_training(capsys, monkeypatch, book, tmp_path):
    data, out = f"data={book[0]}", f"out={tmp_path / 'out'}"
    go = lambda *a: call(capsys, monkeypatch, "train", *a)
    more = "; qwen-nb train -h says more"
    refused(go("lr=abc"), "lr is 'abc'; expected a number, such as lr=0.001" + more)
    refused(go("checkpointing=yes"), "'yes'; expected true or false, such as checkpointing=false")
    refused(go("batchsize=3"), "batchsize", "batch_size")
    refused(go("lrr=1"), "no setting 'lrr'; did you mean lr? qwen-nb train -h says more")
    refused(go("colour=blue"), "no setting 'colour'; qwen-nb train -h lists the 35 that there are")
    refused(go("-x"), "there is no option -x", "qwen-nb train -h")
    for words in (["--lr", "1"], ["--lr=1"], [data, "--lr", "1"]):
        refused(go(*words), "--lr", "lr=5e-4")
    refused(go("lr"), "lr is no setting, such as lr=5e-4", ".toml" + " or .json" + more)
    refused(go(tmp_path / "no.toml"), "no.toml: expected a .toml or .json file of settings" + more)
    for name in ("init_from", "config_from"):
        refused(go(f"{name}={tmp_path / 'none'}", out), tmp_path / "none", more)
    refused(go(tmp_path / "a.toml", tmp_path / "b.toml"), "a.toml", "b.toml", "one config")
    refused(go("--engine", "ddp"), "--engine ddp", "torchrun")
    refused(go(data, out, *TINY, f"seed={2**64}"), "seed", 2**64)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        refused(go(data, out, *TINY), "torchrun")
        patch.setenv("WORLD_SIZE", "1")  # as some schedulers set it: this process is alone
        assert go(data, f"out={tmp_path / 'alone'}", *TINY, "steps=1")[0] == 0
    refused(go(f"data={tmp_path / 'none'}", out, *TINY), "no prepared data", "none")
    (tmp_path / "a book.pdf").write_bytes(b"%PDF")
    what_helps = f"qwen-nb data '{tmp_path / 'a book.pdf'}' --out 'a book'"
    refused(go(f"data={tmp_path / 'a book.pdf'}", out, *TINY), "is a document", what_helps)
    refused(go(f"data={tmp_path / 'none'}"), f"qwen-nb data YOUR.pdf --out {tmp_path / 'none'}")
    refused(go(data, out, *TINY, "vocab_size=100"), "vocab_size", 300)
    refused(
        go(data, out, *TINY, "seq_len=100000", "max_position_embeddings=100000"), "seq_len 100000"
    )
    refused(go(data, f"out={book[0].parent}", *TINY), "no run of ours", "a book.pdf")
    assert go(data, out, *TINY, "steps=2")[0] == 0
    refused(go(data, out, *TINY, "steps=2", "lr=1e-3"), out[4:], "lr was 0.003 and is now 0.001")
    status, said, err = go(data, out, *TINY, "--engine", "ddp", "steps=2")  # in any order
    refused((status, said, err), "torchrun")
    status, said, err = go(
        data, f"out={tmp_path / 'wild'}", *TINY, "lr=1e30", "steps=20", "eval_every=0"
    )
    assert (
        status == 2
        and not said
        and "step-000000 is safe: try a lower lr" in err
        and "Traceback" not in err
    )


def test_the_settings_in_the_help(capsys, monkeypatch):
    """They are those of the dataclass, and what data's options are if not given is what prepare
    does."""
    import inspect
    from dataclasses import fields

    from qwen_nb.documents import prepare
    from qwen_nb.settings import TrainConfig

    assert [(name, value) for name, value, _ in cli.settings_of()] == [
        (f.name, f.default) for f in fields(TrainConfig)
    ]
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(capsys, monkeypatch, "train", "-h")
    assert (
        status == 0
        and all(f"\n  {f.name}=" in out for f in fields(TrainConfig))
        and max(map(len, out.partition("settings, and")[2].splitlines())) <= 80
    )
    assert "checkpointing=false" in out and "lr=0.001 " in out and "\n  beta2=0.95\n" in out
    status, out, _ = call(capsys, monkeypatch, "data", "-h")
    for name in ("vocab_size", "held_out", "mark", "at_most"):
        assert (
            str(inspect.signature(prepare).parameters[name].default)
            in " ".join(out.partition("\n  --" + name.replace("_", "-") + " ")[2].split())[:150]
        ), name


def test_the_example_config():
    from qwen_nb.settings import read_run_config

    path = Path(__file__).resolve().parent.parent / "configs/mine.toml"
    config = read_run_config(path)
    assert (
        config.data != "world"
        and f"qwen-nb data YOUR.pdf --out {config.data}" in path.read_text(encoding="utf-8")
    )


# ---- chat, with a model that says what we want


class Answers(Scripted):
    folder = None


def scripted(*texts, family="qwen3", **kw):
    tokenizer = Tokenizer.from_pretrained()
    return Chat(Answers(tokenizer, *texts), tokenizer, family=family, **kw)


def talk(chat, *lines, file=None, terminal=True):
    lines = iter(lines)

    def ask():
        line = next(lines, EOFError)
        if isinstance(line, type):
            raise line
        return line

    return talk_with(chat, ask, Screen(file), terminal)


def test_commands(capsys):
    chat = scripted("One.", "Two.")
    assert (
        talk(
            chat,
            "",
            "   ",
            "Hello",
            "/think",
            "/think off",
            "/think",
            "/think on",
            "/think maybe",
            "/foo bar",
            "/help",
            " /help",
            "/reset",
            "/exit",
            "no",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "One.\nTwo.\n" and chat.messages == [] and chat.enable_thinking is True
    assert err.splitlines()[:5] == [
        "Thinking is on; /think on and /think off change it.",
        "Thinking is off.",
        "Thinking is off; /think on and /think off change it.",
        "Thinking is on.",
        "Expected /think on or /think off.",
    ]
    assert err.splitlines()[5] == "There is no command /foo bar; /help lists them." and all(
        name in err for name in COMMANDS
    )
    chat = scripted(family="qwen2.5")
    talk(chat, "/think on")
    assert "not learnt to think" in capsys.readouterr().err and chat.enable_thinking is None


def test_thinking_is_dim_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    said, plain = (
        "<think>\nHm, so.\n</think>\n\nYes.\x1b[2J\nNo.",
        "<think>\nHm, so.\n</think>\n\nYes.",
    )
    talk(scripted(said), "Is it?", file=(file := Terminal()))
    assert (
        re.sub(r"\x1b\[2m(.*?)\x1b\[0m", r"<\1>", file.getvalue()).replace("><", "")
        == "<Hm, so.\n\n>".replace("\n\n>", ">\n\n") + "Yes.␛[2J\nNo.\n"
    )
    talk(scripted(said), "Is it?", file=(file := io.StringIO()))
    assert file.getvalue() == plain + "\x1b[2J\nNo.\n"
    monkeypatch.setenv("NO_COLOR", "1")
    talk(scripted(said), "Is it?", file=(file := Terminal()))
    assert file.getvalue() == plain + "␛[2J\nNo.\n"


def test_ctrl_c_at_the_prompt_needs_a_second_one(capsys):
    chat = scripted("One.", "Two.")
    assert (
        talk(chat, KeyboardInterrupt, "Hello", KeyboardInterrupt, KeyboardInterrupt, "never") == 0
    )
    out, err = capsys.readouterr()
    assert out == "One.\n" and err.count("Ctrl-C once more") == 2 and len(chat.messages) == 2
    with pytest.raises(KeyboardInterrupt):
        talk(chat, KeyboardInterrupt, terminal=False)


def test_what_was_stopped_is_remembered(capsys):
    chat = scripted("One. Two. Three.", "Good.")

    class Stops(io.StringIO):
        def write(self, text):
            super().write(text)
            if "Two" in self.getvalue() and "(" not in text and not hasattr(self, "stopped"):
                self.stopped = True
                raise KeyboardInterrupt

    assert talk(chat, "Count", "And?", file=Stops()) == 0
    assert "(stopped)" in capsys.readouterr().err
    contents = [m["content"] for m in chat.messages]
    assert (
        contents[0] == "Count"
        and contents[1].startswith("One. Two")
        and "Three" not in contents[1]
        and contents[2:] == ["And?", "Good."]
    )


def test_a_question_that_cannot_be_answered(capsys):
    tokenizer = Tokenizer.from_pretrained()
    for terminal, status in ((True, 0), (False, 2)):
        chat = Chat(Answers(tokenizer, "Yes.", positions=64), tokenizer, family="qwen3")
        assert talk(chat, "a b c " * 100, "\udcff", "Ok?", terminal=terminal) == status
        out, err = capsys.readouterr()
        assert (
            out == "Yes.\n" and "64 positions" in err and "UTF-8" in err and len(chat.messages) == 2
        )


# ---- chat, as a process


def test_chat_through_a_pipe(folders):
    options = (
        "chat",
        "--model",
        folders["random"],
        "--max-new-tokens",
        "12",
        "--seed",
        "5",
        "--temperature",
        "1",
    )
    status, out, err = run(*options, stdin=b"Hello\n/think on\n/foo\n\nAnd?")
    assert status == 0 and out and ">" not in out.splitlines()[0] and "\x1b[2m" not in out
    notes = [
        line for line in err.splitlines() if "cut off" not in line and "no longer fits" not in line
    ]
    assert notes == [
        "The model brings no chat template: its prompt is written as qwen2.5's, "
        "going by its model_type.",
        "This model has not learnt to think before it answers.",
        "There is no command /foo; /help lists them.",
    ]
    assert run(*options, stdin=b"Hello\n/think on\n/foo\n\nAnd?")[1] == out


# ---- chat, on a terminal


class Keyboard:
    "A process on a pseudo-terminal."

    def __init__(self, *args, **env):
        import pty

        self.seen, (self.master, slave) = "", pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            env=ENV | env,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(slave)

    def type(self, keys):
        self.seen = ""
        os.write(self.master, keys.encode())

    def press_ctrl_c(self):
        """At the prompt: not between its showing up and Python's first look at the keyboard, where
        Python (3.11) notices it with the next key only."""
        time.sleep(1)
        self.type("\x03")

    def wait(self, pattern, seconds=200):
        "Read until this has come."
        import select

        end = time.time() + seconds
        while not re.search(pattern, self.seen):
            assert time.time() < end, f"{pattern!r} did not come: {self.seen[-500:]!r}"
            if select.select([self.master], [], [], 1)[0]:
                try:
                    more = os.read(self.master, 65536)
                except OSError:
                    more = b""
                if not more:
                    raise AssertionError(f"ended before {pattern!r}: {self.seen[-500:]!r}")
                self.seen += more.decode(errors="replace")
        return self.seen

    def leave(self):
        "Its status, and what it still said."
        try:
            self.wait("$^never")
        except AssertionError as e:
            assert "ended" in str(e), e
        return self.process.wait(60)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def keyboard():
    if os.name == "nt":
        pytest.skip("Windows has no pseudo-terminals of this kind")
    opened = []

    def open_(*args, **env):
        opened.append(Keyboard(*args, **env))
        return opened[-1]

    yield open_
    for k in opened:
        k.close()


PROMPT = r"(^|\n|\r|\x1b\[\?2004h)> $"


def test_ctrl_c_stops_the_answer_and_not_the_program(keyboard, folders):
    k = keyboard("chat", "--model", folders["endless"], "--max-new-tokens", 90000)
    greeting = k.wait(PROMPT)
    assert (
        str(folders["endless"]) in greeting
        and "/reset" in greeting
        and "/help" in greeting
        and "/think" not in greeting
    )
    for question in ("Hello\r", "Once more\r"):
        k.type(question)
        k.wait("!!!!")
        k.type("\x03")
        assert "(stopped)" in k.wait(PROMPT)
    k.press_ctrl_c()
    assert "Ctrl-C once more" in k.wait(PROMPT)
    k.type("/foo\r")
    assert "There is no command /foo" in k.wait(PROMPT)
    k.press_ctrl_c()
    assert "Ctrl-C once more" in k.wait(PROMPT)
    k.type("\x1b[A")  # the arrow brings back the last line
    if __import__("importlib.util").util.find_spec("readline"):
        k.wait("/foo")
    k.press_ctrl_c()
    assert k.leave() == 0 and "Traceback" not in k.seen


def test_the_packaged_model_on_a_terminal(keyboard):
    k = keyboard("chat", "--max-new-tokens", 8)
    assert EXAMPLE in k.wait(PROMPT) and "/think" in k.seen and "\r\n" in k.seen
    k.type("/think off\r")
    assert "Thinking is off." in k.wait(PROMPT)
    k.type(
        "\x1b[200~Max is in the attic.\nWhere is Max?\x1b[201~\r"
    )  # pasted: one message of two lines
    k.wait(PROMPT)
    k.type("\x04")
    assert (
        k.leave() == 0
        and "Traceback" not in k.seen
        and not re.search(r"[\r\n]> .*[\r\n]> ", k.seen, re.S)
    )


def test_the_example_is_of_the_world():
    from qwen_nb.world import PEOPLE, PLACES, THINGS

    names = set(PEOPLE + PLACES + THINGS) & set(re.findall(r"\w+", EXAMPLE))
    assert names >= {"Max", "Anna", "kitchen", "garden", "ball"}
