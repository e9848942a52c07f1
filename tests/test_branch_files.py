"""Files of skip branches: what is written comes back, and what is broken or hostile is refused."""

from __future__ import annotations

import base64
import http.server
import json
import os
import pickle
import re
import struct
import threading
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import LAYERS, build, sample, surroundings, transformer_of
from skipcache import SkipBranches, add_skip_branches
from skipcache.branches.files import base_model_of, read_record
from skipcache.branches.fingerprint import fingerprint_of
from skipcache.errors import BranchError, BranchFileError, BranchWarning, TargetError

WEIGHTS, RECORD, CARD = "skip_branches.safetensors", "skip_branches.json", "README.md"
WIDTH = 16


def branches_of(**options: Any) -> SkipBranches:
    """Of the tiny DiT, with weights that all matter."""
    torch.manual_seed(3)
    made = SkipBranches(WIDTH, LAYERS, **{"form": "replace", **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of good files, with a base model."""
    return branches_of().save_pretrained(
        tmp_path / "good", base_model=transformer_of("dit"), made_by="training", quality={"psnr": 3}
    )


def rewrite(folder: Path, change: Any) -> None:
    """Changes the record."""
    path = folder / RECORD
    text = json.loads(path.read_text())
    text = change(text) or text
    path.write_text(json.dumps(text))


def refused(folder: Path, says: str = "") -> None:
    """Reading is refused, attaching too, and nothing is attached."""
    pipe = build("dit")
    before = surroundings(pipe)
    with pytest.raises(BranchFileError, match=says) as caught:
        SkipBranches.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(BranchFileError):
        add_skip_branches(pipe, folder)
    assert surroundings(pipe) == before


# Round trip.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"form": "replace"},
        {"form": "residual"},
        {"form": "replace", "rank": 3},
        {"form": "residual", "rank": 1, "pairs": [(0, 5), (0, 3)]},
        {"tensor": "hidden_states"},
    ],
    ids=str,
)
def test_round_trip(options, dtype, tmp_path):
    """Every form, rank, choice of pairs and dtype comes back bit for bit, and can be trained on."""
    made = branches_of(**options).to(dtype)
    assert made.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        WEIGHTS,
        RECORD,
        CARD,
    }
    loaded = SkipBranches.from_pretrained(str(tmp_path / "new" / "folder"))
    for name in ("form", "rank", "pairs", "dim", "depth", "tensor"):
        assert getattr(loaded, name) == getattr(made, name), name
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_samples_of_a_folder_are_those_of_the_module(tmp_path):
    """Saved off one pipeline and added by path to another, they sample the same latents."""
    first = add_skip_branches(build("dit"), branches_of())
    first.transformer.skip_branches.save_pretrained(tmp_path, base_model=first.transformer)
    assert torch.equal(sample(add_skip_branches(build("dit"), tmp_path)), sample(first))


def test_record_and_card(folder):
    """The record says what they are, of which model, how made and how good; a second save keeps
    that, and what is told then replaces it. The card says it to people.
    """
    record = read_record(folder)
    assert record.kind == "branches"
    assert record.settings["pairs"] == [[2, 3], [1, 4], [0, 5]]
    assert record.base_model == base_model_of(transformer_of("dit"))
    assert (record.made_by, record.quality) == ("training", {"psnr": 3})
    loaded = SkipBranches.from_pretrained(folder)
    again = loaded.save_pretrained(folder.parent / "again")
    assert read_record(again) == record
    loaded.save_pretrained(again, made_by="a | b\nc", quality={"fid": 1.5})
    changed = read_record(again)
    assert (changed.made_by, changed.quality) == ("a | b\nc", {"fid": 1.5})
    assert changed.base_model == record.base_model
    card = (again / CARD).read_text()
    assert card.startswith("---\n")
    for line in ("Skip branches for DiTTransformer2DModel", "| fid | 1.5 |", r"a \| b c"):
        assert line in card


def test_saving_over_earlier_files(folder):
    """Other branches saved into the same folder replace all of it, and loaded ones keep theirs."""
    earlier = SkipBranches.from_pretrained(folder)
    kept = {name: tensor.clone() for name, tensor in earlier.state_dict().items()}
    branches_of(rank=2).save_pretrained(folder)
    assert SkipBranches.from_pretrained(folder).rank == 2
    assert all(torch.equal(earlier.state_dict()[name], kept[name]) for name in kept)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, RECORD, CARD}


def offloaded(branches):
    branches.to("meta")


def not_a_number(branches):
    branches.by_target()[4].skip_linear.weight.data[0, 0] = float("nan")


def infinite_in_fp8(branches):
    branches.to(torch.float8_e5m2)
    branches.by_target()[4].skip_linear.weight.data[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (not_a_number, {}, "'layers.4.skip_linear.weight'.*not finite"),
        (infinite_in_fp8, {}, "'layers.4.skip_linear.weight'.*not finite"),
        (offloaded, {}, "offloaded"),
        (lambda branches: None, {"quality": {"psnr": torch.tensor(1.0)}}, "numbers and text"),
    ],
)
def test_what_cannot_be_saved(spoil, options, says, folder):
    """Weights that are not finite or not at hand, and figures that are none: nothing is written."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = branches_of(rank=2)
    spoil(made)
    with pytest.raises(BranchFileError, match=says):
        made.save_pretrained(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path):
    """A file where the folder should be, or a folder where a file should be, is said."""
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / WEIGHTS).mkdir(parents=True)
    for name in ("file", "taken"):
        with pytest.raises(BranchFileError, match="cannot be written"):
            branches_of().save_pretrained(tmp_path / name)


# The base model.


def test_another_class_is_refused(folder):
    """Branches of a DiT are not put on a Latte of the same width and depth; both are named."""
    model = transformer_of("latte")
    with pytest.raises(BranchFileError, match=r"DiTTransformer2DModel.*LatteTransformer3DModel"):
        add_skip_branches(model, folder)
    assert not hasattr(model, "skip_branches")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"layers": 4}, "6 layers.*has 4"), ({"attention_head_dim": 16}, "width 16.*width 32")],
)
def test_another_shape_is_refused(options, says, folder):
    """A model of another depth or width is refused with both numbers."""
    model = transformer_of("dit", **options)
    with pytest.raises(BranchError, match=says):
        add_skip_branches(model, folder)
    assert not hasattr(model, "skip_branches")


def finetuned(model):
    with torch.no_grad():
        for parameter in model.transformer_blocks.parameters():
            parameter.mul_(1.2)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: transformer_of("dit", seed=1), "weights differ by"),
        (lambda: finetuned(transformer_of("dit")), "weights differ by"),
        (lambda: transformer_of("dit", num_embeds_ada_norm=50), "other names or shapes"),
    ],
)
def test_other_weights_are_warned_of(make, says, folder):
    """A model of the same class and shape with other weights gets the branches, and a warning."""
    model = make()
    with pytest.warns(BranchWarning, match=says):
        add_skip_branches(model, folder)
    assert model.skip_branches.record is not None


class Normed(nn.Module):
    """Its weights are small, and its norms one: these must not hide those."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(20))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))
        for linear in self.linears:
            nn.init.normal_(linear.weight, std=0.002)
            nn.init.zeros_(linear.bias)


def test_fingerprint_tells_models_with_equal_norms_apart():
    """Two models that share nothing but norms of one and biases of zero are told apart."""
    torch.manual_seed(0)
    first, second = fingerprint_of(Normed()), fingerprint_of(Normed())
    assert "differ" in first.difference(second)


def in_dtype(dtype):
    def change(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return change


def blocks_wrapped(model):
    for i, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[i] = torch.compile(block, backend="eager")
    return model


def with_branches(model):
    return add_skip_branches(model, branches_of())


@pytest.mark.parametrize(
    "change",
    [
        in_dtype(torch.bfloat16),
        in_dtype(torch.float16),
        in_dtype(torch.float8_e4m3fn),
        lambda model: torch.compile(model, backend="eager"),
        blocks_wrapped,
        with_branches,
    ],
)
def test_fingerprint_stays_the_same(change):
    """Another dtype, compilation and attached branches do not make another model of it."""
    own, changed = (
        base_model_of(transformer_of("dit")),
        base_model_of(change(transformer_of("dit"))),
    )
    assert changed.name == own.name
    assert own.fingerprint.difference(changed.fingerprint) is None
    assert own.fingerprint.samples


def test_fingerprint_of_weights_that_are_no_numbers(tmp_path):
    """A base model with NaN in it still makes files that can be read."""
    model = transformer_of("dit")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    branches_of().save_pretrained(tmp_path, base_model=model)
    assert SkipBranches.from_pretrained(tmp_path).record.base_model.fingerprint.samples == ()


def test_a_base_model_that_is_none(tmp_path):
    """Something else than a transformer given as base model is refused, and nothing written."""
    with pytest.raises(TargetError):
        branches_of().save_pretrained(tmp_path / "new", base_model="DiT")
    assert not (tmp_path / "new").exists()


# Broken and hostile files.


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def truncated_weights(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


def truncated_header(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:20])


def corrupt_header(folder):
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[10:20] = b"\xff" * 10
    path.write_bytes(content)


def huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def offsets_past_the_end(folder):
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def random_bytes(folder):
    draw = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0))
    (folder / WEIGHTS).write_bytes(bytes(draw.tolist()))


def empty_weights(folder):
    (folder / WEIGHTS).write_bytes(b"")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def folder_as_weights(folder):
    no_weights(folder)
    (folder / WEIGHTS).mkdir()


def bare_pickle(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(folder / "ran")))


def torch_pickle(folder):
    torch.save({"layers.3.skip_norm.weight": Payload(folder / "ran")}, folder / WEIGHTS)


def pickle_as_record(folder):
    (folder / RECORD).write_bytes(pickle.dumps(Payload(folder / "ran")))


@pytest.mark.parametrize(
    "spoil",
    [
        truncated_weights,
        truncated_header,
        corrupt_header,
        huge_header,
        offsets_past_the_end,
        random_bytes,
        empty_weights,
        no_weights,
        folder_as_weights,
        bare_pickle,
        torch_pickle,
        pickle_as_record,
    ],
)
def test_files_that_cannot_be_read(spoil, folder):
    """Truncated, corrupt and foreign files are refused by name, and no code in them is run."""
    spoil(folder)
    refused(folder, "cannot be read")
    assert not (folder / "ran").exists()


def test_the_payload_would_run(tmp_path):
    """The pickle that is refused above does run its code where it is unpickled."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def edit(change):
    """Changes the tensors."""

    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


NAME = "layers.4.skip_linear.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.pop(NAME), rf"missing \['{NAME}'\], extra \[\]"),
        (lambda t: t.update(more=torch.ones(1)), r"missing \[\], extra \['more'\]"),
        (lambda t: t.update({NAME: t[NAME].T.contiguous()}), rf"'{NAME}' has shape \(32, 16\)"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), rf"'{NAME}'.*int8"),
        (lambda t: t.update({NAME: t[NAME] * float("nan")}), rf"'{NAME}'.*finite"),
        (lambda t: t[NAME][0].fill_(float("-inf")), rf"'{NAME}'.*finite"),
        (
            lambda t: t.update({NAME: (t[NAME] * float("nan")).to(torch.float8_e4m3fn)}),
            rf"'{NAME}'.*finite",
        ),
    ],
)
def test_tensors_that_do_not_fit(spoil, says, folder):
    """A tensor too few or too many, of another shape or kind, or not finite, is named."""
    edit(spoil)(folder)
    refused(folder, says)


def test_weights_stored_in_fp8_are_read(folder):
    """Finite weights in fp8 are read, and take on the model's dtype when they are attached."""
    edit(lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}))(folder)
    model = add_skip_branches(transformer_of("dit"), folder)
    assert {p.dtype for p in model.skip_branches.parameters()} == {torch.float32}


def without(name):
    return lambda text: {key: value for key, value in text.items() if key != name}


def setting(**changes):
    return lambda text: text["settings"].update(changes)


def base(**changes):
    return lambda text: text["base_model"].update(changes)


def samples(*values):
    return lambda text: text["base_model"]["fingerprint"].update(samples=list(values))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("format_version"), "lacks format_version"),
        (without("kind"), "lacks kind"),
        (without("settings"), "lacks settings"),
        (lambda t: t["settings"].pop("rank"), "lacks rank"),
        (lambda t: {"format_version": 1}, "lacks kind, settings"),
        (lambda t: t.update(format_version=2), "format version 2.*Upgrade"),
        (lambda t: t.update(format_version="1"), "format_version is '1'"),
        (lambda t: t.update(format_version=True), "format_version is True"),
        (lambda t: t.update(settings=[]), "settings"),
        (lambda t: t.update(kind="fitted"), "apply_skip_cache"),
        (lambda t: t.update(kind="other"), "does not know it"),
        (lambda t: t.update(kind=["branches"]), "does not know it"),
        (lambda t: [t], "not an object"),
        (lambda t: t.update(made_by=3), "made_by"),
        (lambda t: t.update(quality=[1]), "quality"),
        (setting(dim=8), "has shape"),
        (setting(depth=4), "describes no branches"),
        (setting(dim=2**70), "describes no branches"),
        (setting(dim=-1), "describes no branches"),
        (setting(dim="16"), "describes no branches"),
        (setting(rank=0), "describes no branches"),
        (setting(rank=2), "skip_down"),
        (setting(form="sum"), "describes no branches"),
        (setting(form=["replace"]), "describes no branches"),
        (setting(pairs=[]), "describes no branches"),
        (setting(pairs=[[3, 2]]), "describes no branches"),
        (setting(pairs=[[0.5, 3]]), "describes no branches"),
        (setting(pairs=[[float("inf"), 3]]), "describes no branches"),
        (setting(pairs=[[0, 3]]), "extra"),
        (setting(tensor=7), "describes no branches"),
        (base(name=None, fingerprint=None), "base_model is malformed"),
        (lambda t: t.update(base_model="DiT"), "base_model is malformed"),
        (samples(1.0, 2.0), "base_model is malformed"),
        (samples(*[float("nan")] * 64), "base_model is malformed"),
        (samples(*[10**400] * 64), "base_model is malformed"),
        (samples(*["x"] * 64), "base_model is malformed"),
    ],
)
def test_records_that_cannot_be(change, says, folder):
    """Every record that lacks something, is newer or contradicts itself or its tensors is refused,
    with what is wrong.
    """
    rewrite(folder, change)
    refused(folder, says)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[" * 100_000, '{"format_version": 1' + "0" * 5000 + "}", "\x00\xff"],
    ids=["empty", "open", "null", "deep", "long-number", "bytes"],
)
def test_records_that_are_no_json(text, folder):
    """A record that is no JSON object, or one made to exhaust the reader, is refused."""
    (folder / RECORD).write_text(text, encoding="latin-1")
    refused(folder, "cannot be read|not an object")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.update(license="none", notes=1), "license, notes"),
        (setting(colour="blue"), "colour"),
    ],
)
def test_unknown_keys_are_warned_of(change, names, folder):
    """A key that this version does not know is named in a warning, and the branches are loaded."""
    expected = SkipBranches.from_pretrained(folder).state_dict()
    rewrite(folder, change)
    with pytest.warns(BranchWarning, match=f"{names} not known"):
        loaded = SkipBranches.from_pretrained(folder)
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)


# The hub.


@pytest.mark.parametrize(
    "source",
    ["name", "a/b/c", "/none", "user/name\n", "a\\b", "C:/branches", Path("user/name")],
    ids=repr,
)
def test_what_is_neither_folder_nor_id(source, tmp_path, monkeypatch):
    """Anything but a folder that is there or ``user/name`` is refused without a look elsewhere."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BranchFileError, match="no hub id"):
        SkipBranches.from_pretrained(source)


def test_a_folder_is_never_looked_up_elsewhere(tmp_path, monkeypatch):
    """A folder named like a hub id is the folder, and says what it lacks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name").mkdir(parents=True)
    with pytest.raises(BranchFileError, match=RECORD):
        SkipBranches.from_pretrained("user/name")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("source", ["../secrets", "./name", "user/..", "..-/x", "user/a--b"])
def test_ids_that_are_paths(source):
    """An id that climbs out of the cache, or could, is refused by what it is."""
    with pytest.raises(BranchFileError, match=re.escape(source)):
        SkipBranches.from_pretrained(source, local_files_only=True)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only"])
def test_offline(how, monkeypatch, folder):
    """Without the network an id that is not in the cache is an error that names it, and a folder
    needs no network.
    """
    is_offline = how == "HF_HUB_OFFLINE"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    with pytest.raises(BranchFileError, match=r"'user/branches'.*cannot be had"):
        SkipBranches.from_pretrained("user/branches", local_files_only=not is_offline)
    SkipBranches.from_pretrained(folder)


@pytest.mark.usefixtures("hub_cache")
def test_nothing_is_attached_offline(monkeypatch):
    """Branches that cannot be had leave the pipeline as it was."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe = build("dit")
    before = surroundings(pipe)
    with pytest.raises(BranchFileError, match="'user/branches'"):
        add_skip_branches(pipe, "user/branches")
    assert surroundings(pipe) == before


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload and a download need."""

    files: dict[str, bytes]
    commit = "0123456789" * 4
    refusal: int | None = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        base = f"http://{self.headers['Host']}"
        if self.refusal is not None:
            self.answer({"error": "no"}, self.refusal)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": f"{base}/user/branches"})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{base}/user/branches/commit/{self.commit}"
            self.answer({"commitUrl": url, "commitOid": self.commit, "hookOutput": ""})

    def do_GET(self) -> None:
        content = self.files.get(self.path.rsplit("/", 1)[1])
        if content is None:
            self.answer({}, 404)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def answer(self, text: Any, status: int = 200) -> None:
        content = json.dumps(text).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(hub_cache, monkeypatch):
    """A hub on this machine, and the only one that is known."""
    handler = type("Hub", (Hub,), {"files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_pushed_and_loaded_from_a_hub(hub):
    """What is pushed is the three files; loaded by id they are the same branches, from the cache
    without the network too.
    """
    made = branches_of(rank=2)
    address = made.push_to_hub("user/branches", base_model=transformer_of("dit"), made_by="a test")
    assert address.endswith(f"/user/branches/commit/{hub.commit}")
    assert hub.files.keys() == {WEIGHTS, RECORD, CARD}
    online = SkipBranches.from_pretrained("user/branches")
    hub.files.clear()
    cached = SkipBranches.from_pretrained("user/branches", local_files_only=True)
    for loaded in (online, cached):
        assert loaded.record.made_by == "a test"
        assert loaded.state_dict().keys() == made.state_dict().keys()
        assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in made.state_dict().items())


def test_a_hub_that_refuses(hub):
    """A hub that has no such files, or denies an upload, is an error that names the id."""
    with pytest.raises(BranchFileError, match="'user/other'"):
        SkipBranches.from_pretrained("user/other")
    hub.refusal = 403
    with pytest.raises(BranchFileError, match="'user/branches' could not be uploaded"):
        branches_of().push_to_hub("user/branches")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_that_is_not_there(monkeypatch):
    """A hub that cannot be reached is an error that names the id, and broken weights are never
    sent.
    """
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    made = branches_of()
    with pytest.raises(BranchFileError, match="'user/branches' could not be uploaded"):
        made.push_to_hub("user/branches")
    not_a_number(made)
    with pytest.raises(BranchFileError, match="not finite"):
        made.push_to_hub("user/branches")
