"""Checkpoints: what is written is whole or not there; what is read is verified, of plain types, and never code."""

import errno
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from resnet_cifar import checkpoint
from resnet_cifar.errors import CheckpointError, StorageError
from resnet_cifar.tables import append_csv

REPOSITORY = Path(__file__).parents[1]


def state(number=0, features=3):
    model = torch.nn.Linear(features, 2)
    torch.nn.init.constant_(model.weight, number)
    return {
        **dict.fromkeys(checkpoint.KEYS),
        "config": {"seed": number},
        "model": model.state_dict(),
        "progress": {"epoch": number},
    }


def signed(content):
    """Any bytes under a checkpoint's mark and the SHA-256 that belongs to them."""
    return content + b"sha256:" + hashlib.sha256(content).hexdigest().encode()


def test_a_state_comes_back_and_the_older_one_is_kept(tmp_path):
    for number in range(3):
        checkpoint.save(state(number), tmp_path)
    assert checkpoint.load(tmp_path)["config"] == {"seed": 2}
    assert checkpoint.load(tmp_path / "previous.pt")["config"] == {"seed": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_run_folder_is_as_good_as_its_checkpoint_folder(tmp_path):
    checkpoint.save(state(5), tmp_path / "checkpoints")
    assert checkpoint.exists(tmp_path / "checkpoints")
    assert checkpoint.load(tmp_path)["config"] == {"seed": 5}


def test_the_file_ends_in_the_sha256_of_the_rest(tmp_path):
    content = checkpoint.save(state(), tmp_path).read_bytes()
    assert content[-64:].decode() == hashlib.sha256(content[:-71]).hexdigest()


def test_plain_torch_reads_it_with_weights_only(tmp_path):
    loaded = torch.load(checkpoint.save(state(7), tmp_path), weights_only=True)
    assert loaded["config"] == {"seed": 7}


def test_only_the_last_is_kept_in_the_end_and_leftovers_are_swept(tmp_path):
    checkpoint.save(state(0), tmp_path)
    checkpoint.save(state(1), tmp_path)
    (tmp_path / ".last.pt.tmp").write_bytes(b"cut short by a kill")
    checkpoint.keep_only_last(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_leftover_is_in_nobodys_way(tmp_path):
    (tmp_path / ".last.pt.tmp").write_bytes(b"cut short by a kill")
    checkpoint.save(state(3), tmp_path)
    assert checkpoint.load(tmp_path)["config"] == {"seed": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("mine")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".last.pt.tmp").symlink_to(tmp_path / "outside")
    checkpoint.save(state(), folder)
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_reader_never_sees_half_a_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(state(1), tmp_path)
    seen = []
    replace = os.replace

    def look_first(source, target):
        seen.append(checkpoint.load(tmp_path)["config"]["seed"])
        replace(source, target)
        seen.append(checkpoint.load(tmp_path)["config"]["seed"])

    monkeypatch.setattr(os, "replace", look_first)
    checkpoint.save(state(2), tmp_path)
    assert seen == [1, 1, 1, 2]


def test_it_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, call=call, name=name: (calls.append(name), call(*a))[1])
    checkpoint.save(state(), tmp_path)
    assert calls == ["fsync", "replace", "fsync"]  # the file, the name, the folder


def test_so_are_the_rows_of_the_tables_before_it(tmp_path, monkeypatch):
    on_disk, sync = [], os.fsync

    def synced(descriptor):
        sync(descriptor)
        on_disk.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", synced)
    assert append_csv(tmp_path / "history.csv", [{"epoch": 1, "lr": 0.1}])
    assert on_disk == [(tmp_path / "history.csv").stat().st_size]


# What is refused


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["PAYLOAD_RAN"]),))


def pickled_code():
    return pickle.dumps({**state(), "config": Payload()})


def saved_code():
    buffer = io.BytesIO()
    torch.save({**state(), "config": Payload()}, buffer)
    return buffer.getvalue()


def one_bit_flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def of_another_program():
    buffer = io.BytesIO()
    torch.save({"state_dict": {}}, buffer)
    return signed(buffer.getvalue())


DAMAGES = {
    "a flipped bit": (one_bit_flipped, "SHA-256 does not match"),
    "a flipped bit in the digest": (lambda content: content[:-1] + b"x", "SHA-256 does not match"),
    "cut short": (lambda content: content[:-100], "cut short"),
    "empty": (lambda _: b"", "cut short"),
    "a signed pickle of code": (lambda _: signed(pickled_code()), "could run code"),
    "a signed torch file of code": (lambda _: signed(saved_code()), "could run code"),
    "an unsigned torch file of code": (lambda _: saved_code(), "not a checkpoint of this program"),
    "signed garbage": (lambda _: signed(b"\x80\x02garbage"), "could run code"),
    "another program's": (lambda _: of_another_program(), "not a checkpoint of this program"),
}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD_RAN", str(tmp_path / "payload_ran"))
    return tmp_path / "payload_ran"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_refused_with_one_clear_message(tmp_path, ran, damage):
    spoil, part = DAMAGES[damage]
    path = checkpoint.save(state(), tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=part) as error:
        checkpoint.load(path)
    assert len(str(error.value).splitlines()) <= 3 and str(path) in str(error.value)
    assert not ran.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_older_one_is_taken_where_there_is_one(tmp_path, ran, caplog, damage):
    checkpoint.save(state(1), tmp_path)
    path = checkpoint.save(state(2), tmp_path)
    path.write_bytes(DAMAGES[damage][0](path.read_bytes()))
    assert checkpoint.load(tmp_path)["config"] == {"seed": 1}
    assert "Falling back to previous.pt" in caplog.text
    assert not ran.exists()


def test_code_would_have_run_without_weights_only(ran):
    torch.load(io.BytesIO(saved_code()), weights_only=False)
    assert ran.exists()


def test_a_checkpoint_of_another_model_is_refused_and_the_older_one_taken(tmp_path):
    network = torch.nn.Linear(3, 2)
    checkpoint.save(state(1), tmp_path)
    path = checkpoint.save(state(2, features=4), tmp_path)
    assert checkpoint.load(tmp_path, network)["config"] == {"seed": 1}
    with pytest.raises(CheckpointError, match="of another model"):
        checkpoint.load(path, network)


def test_a_damaged_checkpoint_does_not_push_out_the_valid_one(tmp_path):
    checkpoint.save(state(1), tmp_path)
    path = checkpoint.save(state(2), tmp_path)
    path.write_bytes(b"damaged")
    checkpoint.save(state(3), tmp_path)
    assert checkpoint.load(tmp_path / "previous.pt")["config"] == {"seed": 1}


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="No checkpoint in"):
        checkpoint.load(tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.load(tmp_path / "last.pt")


# A full disk


def test_a_full_disk_keeps_the_old_checkpoint_and_names_what_is_needed(tmp_path):
    """On a file system of 256 kB of its own, in a process that may mount one."""
    code = (
        "import sys, torch; from pathlib import Path; from resnet_cifar import checkpoint\n"
        "folder = Path(sys.argv[1])\n"
        "whole = dict.fromkeys(checkpoint.KEYS)\n"
        "checkpoint.save({**whole, 'model': {'w': torch.zeros(20_000)}}, folder)\n"
        "try: checkpoint.save({**whole, 'model': {'w': torch.zeros(100_000)}}, folder)\n"
        "except checkpoint.StorageError as error: print(error)\n"
        "print(len(checkpoint.load(folder)['model']['w']), *sorted(p.name for p in folder.iterdir()))\n"
    )
    mount = f'mount -t tmpfs -o size=256k tmpfs {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, code]
    if shutil.which("unshare") is None or subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk: unshare --user --mount is refused")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    message, _, files = done.stdout.strip().rpartition("\n")
    assert "The disk is full: a checkpoint needs 0.4 MB, 0." in message, done.stderr
    assert files == "20000 last.pt"


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "The disk is full"), (errno.EDQUOT, "Your quota is used up")]
)
def test_a_disk_that_is_full_when_it_syncs_is_said_too(tmp_path, monkeypatch, number, said):
    checkpoint.save(state(1), tmp_path)

    def full(_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for folder, still_there in {tmp_path: True, tmp_path / "first": False}.items():
            with pytest.raises(StorageError, match=said) as error:
                checkpoint.save(state(2), folder)
            assert ("still there" in str(error.value)) == still_there
    assert error.value.exit_code == 5
    (tmp_path / "first").rmdir()
    assert checkpoint.load(tmp_path)["config"] == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        checkpoint.save(state(), tmp_path / "checkpoints")


def test_the_file_is_a_zip_of_tensors_and_no_code(tmp_path):
    with zipfile.ZipFile(io.BytesIO(checkpoint.save(state(), tmp_path).read_bytes()[:-71])) as archive:
        [record] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        assert b"resnet_cifar" not in archive.read(record)
