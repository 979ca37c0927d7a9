"""References: on disk, from other programs, and made by one or several processes."""

import json
import os
import pickle
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import NoiseSource
from training_helpers import start_processes

from jlt.cli.main import main
from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.evaluation.metrics import FeatureStatistics
from jlt.evaluation.reference import Reference, check_reference, open_reference, reference_statistics
from jlt.experiments.make_reference import make_reference
from jlt.runtime.processes import Group, SingleProcess
from jlt.runtime.random_numbers import random_subset
from jlt.runtime.signals import Stopped

PROTOCOL = {"images": {"kind": "digits"}, "resolution": 32}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Corners(FeatureExtractor):
    """Some pixels of an image, as features."""

    name = "corners"
    dimension = 5
    spatial_dimension = 3

    def __init__(self):
        """No network."""

    def __call__(self, images):
        flat = images.flatten(1).float()
        return Features(flat[:, :5], None, flat[:, 7:10])

    def identity(self):
        return {"name": self.name, "weights_sha256": "0", "input_size": 8, "dimension": 5}

    def to(self, device):
        return self


def statistics(dimension=4, seed=0, count=30):
    found = FeatureStatistics(dimension)
    found.update(torch.randn(count, dimension, generator=generator(seed)))
    return found


@pytest.fixture
def saved(tmp_path) -> tuple[Reference, Path]:
    kept = torch.randn(8, 4, generator=generator(2))
    reference = Reference(statistics(), statistics(3, seed=1), kept, PROTOCOL)
    reference.save(tmp_path / "stats.npz")
    return reference, tmp_path / "stats.npz"


# ---- on disk ----


def test_a_reference_survives_the_disk(saved):
    reference, path = saved
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["features", "mu", "mu_s", "sigma", "sigma_s"]
        assert (file["mu"].dtype, file["sigma"].shape, file["sigma_s"].shape) == (np.float64, (4, 4), (3, 3))
        assert file["features"].dtype == np.float32
    loaded = Reference.load(path)
    for one, other in ((loaded.pooled, reference.pooled), (loaded.spatial, reference.spatial)):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.covariance, other.covariance)
        assert one.count == 30
        more = torch.randn(9, one.dimension, generator=generator(1))
        one.update(more)
        other.update(more)
        assert torch.equal(one.covariance, other.covariance)
    assert torch.equal(loaded.kept, reference.kept)
    assert loaded.identity() == reference.identity()
    assert loaded.protocol == PROTOCOL


def test_a_reference_of_moments_alone(tmp_path):
    Reference(statistics(), protocol=PROTOCOL).save(tmp_path / "stats.npz")
    loaded = Reference.load(tmp_path / "stats.npz")
    assert (loaded.spatial, loaded.kept, loaded.count) == (None, None, 30)


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s", "features"])
def test_the_hash_covers_every_array(saved, name):
    _, path = saved
    with np.load(path) as file:
        arrays = dict(file)
    arrays[name] = arrays[name] * np.float32(1.001)
    np.savez(path, **arrays)
    with pytest.raises(JLTError, match="one of the two was replaced"):
        Reference.load(path)


def test_statistics_are_written_to_npz_only(saved, tmp_path):
    with pytest.raises(JLTError, match=r"ends in \.npz"):
        saved[0].save(tmp_path / "stats.json")


class Trap:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_refused_and_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    np.savez(tmp_path / "objects.npz", mu=np.array([Trap(sprung)], dtype=object), sigma=np.eye(1))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap(sprung)))
    np.savez(tmp_path / "kept.npz", mu=np.zeros(1), sigma=np.eye(1), features=np.array([Trap(sprung)], dtype=object))
    torch.save({"mu": Trap(sprung), "sigma": np.eye(1)}, tmp_path / "torch.pt")
    torch.save({"mu": np.array([Trap(sprung)], dtype=object), "sigma": np.eye(1)}, tmp_path / "object.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("objects.npz", "bare.npz", "kept.npz", "torch.pt", "object.pt", "bare.pt"):
        with pytest.raises(JLTError, match="does not hold statistics"):
            Reference.load(tmp_path / name)
    assert not sprung.exists()
    # The trap works.
    pickle.loads((tmp_path / "bare.npz").read_bytes())
    assert sprung.exists()


def test_files_that_are_no_statistics_are_refused(saved, tmp_path):
    _, path = saved
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    wrong = {
        "missing.npz": None,
        "empty.npz": b"",
        "empty.pt": b"",
        "truncated.npz": whole[:-50],
        "flipped.npz": whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        "array.npz": (tmp_path / "array.npy").read_bytes(),
    }
    for name, content in wrong.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(JLTError, match=name):
            Reference.load(tmp_path / name)
    shapes = [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.zeros((3, 1)), "sigma": np.eye(3)},
        {"mu": np.array(["a"]), "sigma": np.eye(1)},
        {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])},
        {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((9, 3))},
    ]
    for arrays in shapes:
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(JLTError, match=r"wrong\.npz"):
            Reference.load(tmp_path / "wrong.npz")


# ---- other programs' files ----


def features_of_others(dimension=5):
    return np.random.default_rng(0).standard_normal((50, dimension)).astype(np.float32)


def written_by_pytorch_fid(path):
    features = features_of_others().astype(np.float64)
    np.savez_compressed(path, mu=np.mean(features, axis=0), sigma=np.cov(features, rowvar=False))


def written_by_adm(path):
    pooled, spatial = features_of_others(), features_of_others(3)
    np.savez(
        path,
        arr_0=np.zeros((2, 8, 8, 3), np.uint8),
        mu=np.mean(pooled, axis=0),
        sigma=np.cov(pooled, rowvar=False),
        mu_s=np.mean(spatial, axis=0),
        sigma_s=np.cov(spatial, rowvar=False),
    )


def written_by_torch_fidelity(path):
    features = features_of_others()
    torch.save({"mu": np.mean(features, axis=0), "sigma": np.cov(features, rowvar=False)}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.npz", written_by_pytorch_fid), ("b.npz", written_by_adm), ("c.pt", written_by_torch_fidelity)],
)
def test_statistics_of_other_programs_are_accepted_with_a_notice(tmp_path, capsys, name, write):
    write(tmp_path / name)
    reference = open_reference(str(tmp_path / name), Corners(), 8)
    np.testing.assert_allclose(reference.pooled.mean.numpy(), features_of_others().mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        reference.pooled.covariance.numpy(), np.cov(features_of_others().T), rtol=1e-4, atol=1e-6
    )
    assert (reference.count, reference.kept, reference.protocol) == (None, None, {})
    assert (reference.spatial is not None) == (write is written_by_adm)
    (printed,) = capsys.readouterr().err.splitlines()
    assert "does not record the extractor" in printed
    with pytest.raises(ValueError, match="unknown"):
        reference.pooled.update(torch.zeros(2, 5))
    wider = Corners()
    wider.dimension = 6
    with pytest.raises(JLTError, match="dimension 5, .* gives 6"):
        open_reference(str(tmp_path / name), wider, 8)


def test_a_batch_of_images_is_no_reference(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(JLTError, match=r"holds images \(arr_0\), not statistics"):
        Reference.load(tmp_path / "images.npz")


def test_references_of_another_extractor_or_size_are_refused():
    extractor = Corners()
    protocol = {"extractor": extractor.identity(), "resolution": 8}
    check_reference(Reference(statistics(5), protocol=protocol), extractor, 8)
    with pytest.raises(JLTError, match="8x8 pixels, the samples have 16x16"):
        check_reference(Reference(statistics(5), protocol=protocol), extractor, 16)
    with pytest.raises(JLTError, match="spatial features of dimension 2, .* gives 3"):
        check_reference(Reference(statistics(5), statistics(2), protocol=protocol), extractor)
    other = {**protocol, "extractor": {**extractor.identity(), "input_size": 9}}
    with pytest.raises(JLTError, match="another extractor .input_size 9 against 8"):
        check_reference(Reference(statistics(5), protocol=other), extractor)


# ---- made of real images ----


def test_a_selection_is_always_the_same_and_contains_every_class():
    assert random_subset(7, 10).tolist() == list(range(7))
    assert random_subset(0, 4).tolist() == []
    chosen = random_subset(50_000, 10_000)
    assert len(np.unique(chosen)) == 10_000
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, random_subset(50_000, 10_000))
    # Labels that repeat, as i mod 1000: every class has about ten.
    counts = np.bincount(chosen % 1000, minlength=1000)
    assert 0 < counts.min() <= counts.max() < 30


class Threads(Group):
    """Processes simulated by threads."""

    def __init__(self, rank, size, barrier, values):
        super().__init__()
        self.rank, self.size, self._barrier, self._values = rank, size, barrier, values

    def on_rank0(self, work):
        if self.rank == 0:
            self._values["first"] = work()
        self.wait()
        return self._values["first"]

    def gather(self, value):
        self._values[self.rank] = value
        self.wait()
        gathered = [self._values[rank] for rank in range(self.size)]
        self.wait()
        return gathered

    def reduce_to_rank0(self, value, merge):
        raise NotImplementedError

    def add(self, name, amount):
        return amount

    def wait(self):
        self._barrier.wait(timeout=60)


def measured_by(size, source):
    barrier, values, found = threading.Barrier(size), {}, [None] * size

    def work(rank):
        group = Threads(rank, size, barrier, values)
        found[rank] = reference_statistics(source, Corners(), 8, kept=60, group=group)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_measures_the_same(size):
    source = NoiseSource(300)
    alone = reference_statistics(source, Corners(), 8, kept=60, group=SingleProcess())
    images = torch.stack([torch.from_numpy(np.array(source[i][0])) for i in range(300)])
    flat = images.flatten(1).double()
    torch.testing.assert_close(alone.pooled.covariance, torch.cov(flat[:, :5].T), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(alone.spatial.mean, flat[:, 7:10].mean(dim=0), rtol=1e-12, atol=0)
    assert torch.equal(alone.kept, flat[random_subset(300, 60), :5].float())
    for found in measured_by(size, source):
        assert found.count == 300
        torch.testing.assert_close(found.pooled.mean, alone.pooled.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(found.pooled.covariance, alone.pooled.covariance, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.spatial.covariance, alone.spatial.covariance, rtol=1e-10, atol=1e-10)
        assert torch.equal(found.kept, alone.kept)
        assert found.protocol == alone.protocol


def test_a_bad_image_is_named():
    with pytest.raises(JLTError, match=r"noise/70\.png cannot be used"):
        reference_statistics(NoiseSource(100, bad={70}), Corners(), 8)


# ---- the command ----


def test_a_reference_is_made_once_and_kept(tmp_path, capsys):
    out = tmp_path / "new" / "stats.npz"
    first = make_reference(NoiseSource(100), Corners(), 8, out)
    assert Reference.load(out).identity() == first
    written = out.stat().st_mtime_ns
    assert make_reference(NoiseSource(100), Corners(), 8, out) == first
    assert out.stat().st_mtime_ns == written
    assert "already finished" in capsys.readouterr().err
    with pytest.raises(JLTError, match="holds other statistics .*count: 100 -> 90"):
        make_reference(NoiseSource(90), Corners(), 8, out)
    # Killed between the two files.
    out.unlink()
    with pytest.raises(JLTError, match="has another protocol"):
        make_reference(NoiseSource(90), Corners(), 8, out)
    assert make_reference(NoiseSource(100), Corners(), 8, out) == first


class Untouchable(NoiseSource):
    def __getitem__(self, index):
        raise AssertionError("an image was read")


def test_what_cannot_be_written_is_refused_before_the_first_image(tmp_path, monkeypatch):
    written_by_pytorch_fid(tmp_path / "foreign.npz")
    with pytest.raises(JLTError, match="holds other statistics"):
        make_reference(Untouchable(100), Corners(), 8, tmp_path / "foreign.npz")
    with pytest.raises(JLTError, match=r"ends in \.npz"):
        make_reference(Untouchable(100), Corners(), 8, tmp_path / "stats.pt")
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("", (), {"free": 10}))
    with pytest.raises(JLTError, match=r"take 0\.0 MB .* 0\.0 MB are free"):
        make_reference(Untouchable(100), Corners(), 8, tmp_path / "stats.npz")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(JLTError, match="is not writable"):
        make_reference(Untouchable(100), Corners(), 8, tmp_path / "stats.npz")


class Interrupted(NoiseSource):
    in_memory = True

    def __getitem__(self, index):
        if index == 70:
            signal.raise_signal(signal.SIGTERM)
        return super().__getitem__(index)


def test_a_request_to_stop_ends_without_a_file(tmp_path):
    with pytest.raises(Stopped):
        make_reference(Interrupted(300), Corners(), 8, tmp_path / "stats.npz")
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_what_evaluation_takes(tmp_path, capsys):
    out = tmp_path / "digits.npz"
    assert main(["reference", "--images", "digits", "--resolution", "32", "--out", str(out), "--json"]) == 0
    identity = json.loads(capsys.readouterr().out)
    assert (identity["count"], identity["resolution"]) == (1797, 32)
    assert Reference.load(out).identity() == identity
    assert main(["reference", "--images", "digits", "--resolution", "16", "--out", str(out)]) == 1
    assert "holds other statistics (resolution: 32 -> 16)" in capsys.readouterr().err


@pytest.mark.slow
def test_two_real_processes_make_one_file(tmp_path):
    arguments = ["reference", "--images", "digits", "--resolution", "32", "--out", str(tmp_path / "stats.npz")]
    started = start_processes(2, arguments)
    printed = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert "".join(stdout for stdout, _ in printed).count("1,797 images") == 1
    assert Reference.load(tmp_path / "stats.npz").count == 1797
