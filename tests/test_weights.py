"""Our safetensors reader against the library on mutated files, the loader on damaged folders, and
bfloat16."""

import io
import json
import os
import random
import sys
import tracemalloc

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file

from qwen_nb.bfloat16 import bf16_to_float32, float32_to_bf16
from qwen_nb.hub import find_model, open_weights, read_json, save_shards
from qwen_nb.weights import DTYPES, is_sizes, parse_json, read_header, read_safetensors

# --- 10,000 mutated files, each read by both ---


def bits(t):
    return t.reshape(-1).view(torch.uint8)


def known_dtypes():
    "Those that the installed library knows (0.5 has fewer than 0.8)."

    def takes(dtype, width):
        header = json.dumps(
            {"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, width]}}
        ).encode()
        try:
            return bool(deserialize(len(header).to_bytes(8, "little") + header + bytes(width)))
        except SafetensorError:
            return False

    return [d for d, (width, _) in DTYPES.items() if takes(d, width)]


KNOWN = known_dtypes()
SIZES = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "6",
    "8",
    "-1",
    "-0",
    "1.0",
    "2e0",
    "01",
    "true",
    "null",
    '"2"',
    "[]",
    "{}",
    "4294967296",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999",
    "1e999",
    "NaN",
]
VALUES = [
    "null",
    "true",
    "[]",
    "{}",
    '"x"',
    "1.5",
    "-7",
    "1e308",
    "1e309",
    "-1e999",
    "9" * 30,
    "9" * 400,
    "NaN",
    "-Infinity",
    '"\\ud800"',
    '"\\ud83d\\ude00"',
    '"\\u0000"',
    '"\\q"',
    '{"a":1,"a":2}',
    "[" * 124 + "]" * 124,
    "[" * 125 + "]" * 125,
    "[" * 126 + "]" * 126,
    '{"x":' * 125 + "1" + "}" * 125,
    "[1,]",
    "0.",
    ".5",
    "+1",
]
NAMES = [
    "w",
    "v",
    "",
    "__metadata__",
    "\\u005f_metadata__",
    "dtype",
    "é",
    "\\ud800",
    "a\tb",
    "a\\nb",
    "\x7f",
    "\\u00e9",
]


class File:
    """A safetensors file taken apart: pieces of JSON text, so that anything can be written, and the
    data."""

    def __init__(self, rng):
        self.notes = rng.choice(
            [None, None, "{}", '{"format":"pt"}', '{"a":"ä","b":"\\u00e4"}', "null"]
        )
        self.tensors, self.data = [], b""
        for i in range(rng.randint(0, 4)):
            dtype = rng.choice(KNOWN + ["F32", "BF16", "U8"] * 4)
            shape = [rng.choice([0, 1, 2, 3, 4, 8]) for _ in range(rng.randint(0, 3))]
            width, numbers = DTYPES[dtype][0], 1
            for size in shape:
                numbers *= size
            if numbers * width % 8:
                shape, numbers = [*shape, 8], numbers * 8
            raw = rng.randbytes(numbers * width // 8)
            self.tensors.append(
                [
                    f"t{i}",
                    [
                        ["dtype", f'"{dtype}"'],
                        ["shape", [str(s) for s in shape]],
                        ["data_offsets", [str(len(self.data)), str(len(self.data) + len(raw))]],
                    ],
                ]
            )
            self.data += raw

    def header(self, rng):
        def text(value):
            return value if isinstance(value, str) else "[" + ",".join(value) + "]"

        parts = [f'"__metadata__":{self.notes}'] if self.notes else []
        parts += [
            f'"{name}":'
            + (
                fields
                if isinstance(fields, str)
                else "{" + ",".join(f'"{k}":{text(v)}' for k, v in fields) + "}"
            )
            for name, fields in self.tensors
        ]
        if rng.random() < 0.3:
            rng.shuffle(parts)
        return "{" + ",".join(parts) + "}"


def edit(rng, file):
    "Change the header as JSON: most of these would slip past a careless reader."
    kind = rng.randrange(12)
    if kind == 0:
        file.notes = rng.choice(
            [
                '{"a":1}',
                '{"a":null}',
                "[]",
                "7",
                '{"a":"1","a":"2"}',
                '{},"__metadata__":{}',
                '{"a":"\\ud800"}',
                "null",
                '"x"',
                '{"a":{}}',
            ]
        )
    if not file.tensors:
        return
    i = rng.randrange(len(file.tensors))
    name, fields = file.tensors[i]
    if isinstance(fields, str):
        return
    at = {k: j for j, (k, _) in enumerate(fields)}
    if kind == 1 and "dtype" in at:
        fields[at["dtype"]][1] = rng.choice(
            [f'"{d}"' for d in KNOWN]
            + ['"F31"', '"f32"', '""', "3", "null", '{"F32":null}', '{"F32":1}', "[]"]
        )
    if kind == 2:
        file.tensors[i][0] = rng.choice(NAMES)
    if kind == 3:
        file.tensors.insert(
            rng.randrange(len(file.tensors) + 1),
            [rng.choice([name, "t9"]), [list(f) for f in rng.choice(file.tensors)[1]]]
            if all(not isinstance(t[1], str) for t in file.tensors)
            else ["t9", "7"],
        )
    if kind == 4:
        fields.insert(
            rng.randrange(len(fields) + 1),
            [rng.choice(["x", "dtype", "shape", "y\\n"]), rng.choice(VALUES)],
        )
    if kind == 5:
        del fields[rng.randrange(len(fields))]
    if kind == 6:
        file.tensors[i][1] = rng.choice(
            ["null", "7", "[]", '"F32"']
            + [
                "["
                + ",".join(v if isinstance(v, str) else "[" + ",".join(v) + "]" for _, v in fields)
                + "]"
            ]
            * 4
        )
    if kind == 7:
        rng.shuffle(fields)
    if kind in (8, 9, 10):
        key = rng.choice(["shape", "data_offsets"])
        if key not in at or not isinstance(fields[at[key]][1], list):
            return
        sizes = fields[at[key]][1]
        what = rng.randrange(4)
        if what == 0 and sizes:
            sizes[rng.randrange(len(sizes))] = rng.choice(SIZES)
        elif what == 1 and sizes:
            sizes[rng.randrange(len(sizes))] = str(rng.randrange(40))
        elif what == 2:
            sizes.insert(rng.randrange(len(sizes) + 1), rng.choice(["1", "1", *SIZES]))
        elif what == 3:
            rng.shuffle(sizes)
    if kind == 11:
        start, zero = (
            rng.choice(["0", str(len(file.data)), "3"]),
            rng.choice(
                [
                    "[0]",
                    "[0,18446744073709551615]",
                    "[9223372036854775808,4,0]",
                    "[0,9223372036854775808,4]",
                    "[3,0,2]",
                ]
            ),
        )
        file.tensors.append(
            ["z", [["dtype", '"F16"'], ["shape", zero], ["data_offsets", f"[{start},{start}]"]]]
        )


def mutated(rng):
    "The bytes of a file that may or may not be good."
    file = File(rng)
    kind = rng.randrange(8)
    if kind < 4:
        for _ in range(rng.choice([1, 1, 2])):
            edit(rng, file)
    header = file.header(rng).encode("utf-8", "surrogatepass")
    if kind == 4:
        header = (
            rng.choice([b" ", b"\n\t", b"\xef\xbb\xbf", b"\x0b", b"\xc2\xa0", b""])
            + header
            + rng.choice([b" ", b"\r\n", b"\0", b",", b"}", b"\xff", b""])
        )
    if kind == 5:
        header = bytearray(header)
        for _ in range(rng.choice([1, 1, 2, 3])):
            j = rng.randrange(len(header))
            how = rng.randrange(4)
            if how == 0:
                header[j] ^= 1 << rng.randrange(8)
            elif how == 1:
                header[j:j] = bytes([rng.choice(b'{}[]",:0123456789eE.-+ \\ntfu\x00\x80\xed\xa0')])
            elif how == 2:
                del header[j]
            else:
                header[j] = rng.randrange(256)
            header = header or bytearray(b" ")
    data = bytearray(len(header).to_bytes(8, "little") + header + file.data)
    if kind == 6:
        data[:8] = (
            rng.choice(
                [
                    len(header) + rng.randint(-9, 9),
                    rng.randrange(2**64),
                    100_000_001,
                    2**63,
                    2**64 - 8,
                    0,
                ]
            ).to_bytes(8, "little", signed=False)
            if len(header) > 9
            else bytes(8)
        )
    if kind == 7:
        how = rng.randrange(3)
        if how == 0:
            data = data[: rng.randrange(len(data) + 1)]
        elif how == 1:
            data += rng.randbytes(rng.randint(1, 4))
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def theirs(data):
    "Names, dtypes, shapes and bytes as the library gives them; None if it refuses."
    try:
        return {
            name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in deserialize(data)
        }
    except SafetensorError:
        return None


def ours(data):
    try:
        tensors, at = read_header(io.BytesIO(data))
    except ValueError:
        return None  # and nothing else: another exception is a bug
    return {
        name: (t.dtype, t.shape, data[at + t.start : at + t.end]) for name, t in tensors.items()
    }


def their_tensors(path):
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, RuntimeError, TypeError):
        return None


def our_tensors(path):
    try:
        return read_safetensors(path)
    except ValueError:
        return None


def compare(data, path):
    "Whether the file was taken; AssertionError unless both readers did the same."
    a, b = ours(data), theirs(data)
    assert a == b, f"ours {a}, theirs {b}: {data!r}"
    if a is None:
        return False
    path.write_bytes(data)
    a, b = our_tensors(path), their_tensors(path)
    assert (a is None) == (b is None), f"ours {a}, theirs {b}: {data!r}"
    for name, t in (a or {}).items():
        assert (t.dtype, t.shape) == (b[name].dtype, b[name].shape) and torch.equal(
            bits(t), bits(b[name])
        ), (name, data)
    return True


@pytest.mark.skipif(
    sys.byteorder == "big",
    reason="the file's byte order is little-endian, and so must the machine's be",
)
def test_ours_and_the_library_agree_on_10_000_mutated_files(tmp_path):
    rng, taken = random.Random(20261121), 0
    for _ in range(10_000):
        taken += compare(mutated(rng), tmp_path / "x.safetensors")
    assert 2000 < taken < 8000, taken  # neither side may be rare


def build(header, data=b"", claim=None):
    header = header.encode() if isinstance(header, str) else header
    return (len(header) if claim is None else claim).to_bytes(8, "little") + header + data


def test_corners(tmp_path):
    "What seeded mutation may miss."
    one = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    extra = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":%s}}'
    cases = [
        b"",
        b"\0" * 7,
        build(""),
        build("{}"),
        build("{}", b"x"),
        build("{}", claim=2**64 - 1),
        build("[]"),
        build("7"),
        build("[" * 500_000),
        build('{"a":' * 500_000),
        build("{" + one + "," + one + "}", bytes(8)),
        build('{"w":7,' + one + "}", bytes(8)),
        build('{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,8]},' + one + "}", bytes(8)),
    ]
    cases += [
        build("{" + " " * pad + one + "}", bytes(8)) for pad in range(8)
    ]  # data at odd addresses
    cases += [build(extra % value, bytes(8)) for value in VALUES]
    cases += [
        build('{"w":{"dtype":"U8","shape":[%s],"data_offsets":[0,%s]}}' % (a, b), bytes(2))
        for a in SIZES
        for b in SIZES
    ]
    cases += [
        build('{"w":{"dtype":"%s","shape":%s,"data_offsets":[0,%d]}}' % (d, s, n), bytes(n))
        for d in KNOWN + ["Q4"]
        for s in ("[8]", "[16,1]", "[4,2]", "[]", "[0]", "[3]", "[5]")
        for n in (0, 1, 2, 3, 4, 6, 8)
    ]
    taken = [compare(data, tmp_path / "x.safetensors") for data in cases]
    assert any(taken) and not all(taken)


def peak(call):
    tracemalloc.start()
    try:
        try:
            call()
        except ValueError:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_never_more_memory_than_the_file_has(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1 << 20), "b": torch.ones(1 << 19)}, path)
    size, good = path.stat().st_size, path.read_bytes()
    assert 6e6 < peak(lambda: read_safetensors(path)) < size + 50_000
    n = int.from_bytes(good[:8], "little")
    header, data = good[8 : 8 + n].decode(), good[8 + n :]
    lies = [
        b"\xff" * 8 + good[8:],
        (2**40).to_bytes(8, "little") + good[8:],
        good[:-1],
        good + b"x",
        build(header.replace("1048576", str(2**61)), data),
        build(header.replace("[1048576]", "[1048576,1048576]"), data),
        build(header.replace("4194304", str(2**62)), data),
        build(header.replace("F32", "F64"), data),
    ]
    for lie in lies:
        path.write_bytes(lie)
        assert (
            peak(lambda: read_safetensors(path)) < 50_000
        )  # refused before anything was set aside
        assert our_tensors(path) is None and their_tensors(path) is None


# --- the loader ---


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(32, 64).bfloat16() for i in range(6)} | {
        "norm": torch.ones(64),
        "scalar": torch.tensor(3),
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def says(kind, call, *words):
    with pytest.raises(kind) as e:
        call()
    text = str(e.value)
    assert type(e.value) is kind and "\n" not in text and all(w in text for w in words), text


def test_shards_come_back_equal(weights, tmp_path):
    save_shards(weights, tmp_path / "m", max_bytes=9000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3 and same(
        open_weights(tmp_path / "m"), weights
    )
    assert not (tmp_path / "m" / "model.safetensors").exists()
    says(FileExistsError, lambda: save_shards(weights, tmp_path / "m", 9000), str(tmp_path / "m"))
    save_shards(weights, tmp_path / "one", max_bytes=10**9)
    assert same(open_weights(tmp_path / "one"), weights)
    save_shards(
        weights, tmp_path / "each", max_bytes=1
    )  # every tensor is larger than a shard may be
    assert same(open_weights(tmp_path / "each"), weights)


def test_transformers_and_we_read_each_other(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    mine = open_weights(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    state = model.state_dict()
    assert mine and all(torch.equal(t, state[k]) for k, t in mine.items())
    save_shards(mine, tmp_path / "ours", max_bytes=20_000)
    config.save_pretrained(tmp_path / "ours")
    back = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert same(back, state)


def test_a_shard_index_is_not_believed(weights, tmp_path):
    secret = tmp_path / "secret.safetensors"
    save_file({"w": torch.ones(2)}, secret)
    folder = tmp_path / "m"
    save_shards(weights, folder, max_bytes=9000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    for bad in (
        "../secret.safetensors",
        str(secret),
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "a/../../secret.safetensors",
        "secret.bin",
        "",
        "x\0.safetensors",
        7,
        None,
        ["w"],
        {},
    ):
        write(good["weight_map"] | {"w": bad})
        says(ValueError, lambda: open_weights(folder), "index.json", repr(bad))
    for bad in ([], "x", 7, None):
        write(bad)
        says(ValueError, lambda: open_weights(folder), "weight_map")
    write(good["weight_map"] | {"w": "model-00009.safetensors"})
    says(FileNotFoundError, lambda: open_weights(folder), "model-00009.safetensors")
    first = good["weight_map"]["layer.0.weight"]
    write(good["weight_map"] | {"no.such.weight": first})
    says(ValueError, lambda: open_weights(folder), "no.such.weight", first)
    for text in ("", "{", "[]", "null", '"x"', "[" * 100_000):
        index.write_text(text)
        says(ValueError, lambda: open_weights(folder), "index.json")
    index.write_bytes(b'{"weight_map": {"\xff": "x"}}')
    says(ValueError, lambda: open_weights(folder), "index.json")


def test_a_damaged_file_is_refused_by_name(weights, tmp_path):
    path = tmp_path / "model.safetensors"
    good = save(weights)
    for bad in (
        b"",
        b"short",
        good[:100],
        good[:-1],
        good + b"x",
        b"\xff" * len(good),
        b"<html>not here</html>" * 9,
        build("{}", claim=2**40),
    ):
        path.write_bytes(bad)
        says(ValueError, lambda: open_weights(tmp_path), str(path), f"{len(bad):,} bytes")
        says(ValueError, lambda: read_safetensors(path))
    path.write_bytes(good)
    assert same(open_weights(tmp_path), weights) and same(read_safetensors(path), weights)


def test_missing_things(tmp_path):
    nowhere = tmp_path / "nowhere"
    says(FileNotFoundError, lambda: open_weights(nowhere), str(nowhere), "not a folder")
    says(FileNotFoundError, lambda: open_weights(tmp_path), str(tmp_path), "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    says(
        FileNotFoundError, lambda: open_weights(tmp_path), "model.safetensors", "pytorch_model.bin"
    )
    says(
        FileNotFoundError,
        lambda: read_json(tmp_path, "config.json"),
        "config.json",
        "pytorch_model.bin",
    )
    for bad in (b"", b"{", b"[]", b"\xff{}", b"null", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(bad)
        says(ValueError, lambda: read_json(tmp_path, "config.json"), "config.json")


def test_names_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert (
        find_model("org/name") == find_model("./org/name").relative_to(".")
        and find_model(tmp_path / "org") == tmp_path / "org"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_model("~/org") == tmp_path / "org"
    for name in (
        "./gone",
        "../gone",
        "/gone",
        "~/gone",
        "a/b/c",
        "https://huggingface.co/Qwen/Qwen3-0.6B",
        "a\\b",
        str(tmp_path / "gone"),
        tmp_path / "gone",
    ):
        says(FileNotFoundError, lambda: find_model(name), str(name), "no folder")
    (tmp_path / "file").write_text("x")
    says(FileNotFoundError, lambda: find_model("file"), "file", "folder")
    assert (
        find_model() == find_model(None) == find_model("")
        and (find_model() / "config.json").is_file()
    )


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory"
)
def test_opening_reads_nothing(tmp_path):
    def memory(kind):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(kind))

    size = 64 * 2**20
    save_file({f"w{i}": torch.ones(2**20) for i in range(16)}, tmp_path / "model.safetensors")
    open_weights(tmp_path)
    before = memory("RssAnon"), memory("RssFile")
    tensors = open_weights(tmp_path)
    opened = memory("RssAnon"), memory("RssFile")
    assert opened[0] - before[0] < size / 16 and opened[1] - before[1] < size / 16, (
        "opening reads next to nothing"
    )
    assert tensors["w3"].sum() == 2**20
    assert size / 32 < memory("RssFile") - opened[1] < size / 4, "one tensor of sixteen was fetched"
    assert sum(t.sum().item() for t in tensors.values()) == 2**24
    assert memory("RssAnon") - before[0] < size / 16, "the memory is the file's own pages, no copy"


def test_writing_changes_no_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4)}, path)
    before = path.read_bytes()
    w = open_weights(tmp_path)["w"]
    w.zero_()
    assert path.read_bytes() == before and open_weights(tmp_path)["w"].tolist() == [1] * 4


# --- bfloat16 ---


def test_bfloat16_both_ways():
    every = torch.arange(2**16).int().short()
    assert torch.equal(
        bf16_to_float32(every).view(torch.int32),
        every.view(torch.bfloat16).float().view(torch.int32),
    )
    torch.manual_seed(1)
    x = torch.cat(
        [torch.randint(-(2**31), 2**31, (2**18,)).int()]
        + [(every.int() << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    ).view(torch.float32)
    a, b = float32_to_bf16(x).view(torch.bfloat16), x.bfloat16()
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.view(torch.int16)[~b.isnan()], b.view(torch.int16)[~b.isnan()]
    )
    assert float32_to_bf16(torch.randn(6, 4).T).shape == (4, 6)


def test_sizes_are_whole_numbers_of_64_bits():
    for good in ([], [3, 2**64 - 1]):
        assert is_sizes(good), f"{good} is a list of sizes"
    for bad in ([2.0], [True], [-1], [2**64], ["2"], [None], (2, 3)):
        assert not is_sizes(bad), f"{bad} is no list of sizes"


def test_the_bits_of_every_dtype():
    for word, (bits, name) in DTYPES.items():
        there = getattr(torch, name or "", None)
        if there is not None and word != "F4":  # two numbers in a byte
            assert bits == 8 * there.itemsize, word


def test_a_repeated_key_stays_visible():
    assert parse_json('{"a": [1, 2.0], "a": null}') == [("a", [1, 2.0]), ("a", None)]
