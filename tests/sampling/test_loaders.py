"""Loaders are no Poisson samples: each is refused, with what to give instead."""

import numpy as np
import pytest

from dp_ilg.sampling.gather import length, refuse_loader, take
from dp_ilg.sampling.poisson import PoissonSampler
from tests.training.loop import scene


class Dataset:
    """Examples by position, as of PyTorch, Grain and Hugging Face."""

    def __len__(self):
        return 60

    def __getitem__(self, place):
        return np.full(3, place, np.float32), np.int32(place % 2)


class DataLoader:
    """What PyTorch's shows of itself."""

    def __init__(self, dataset, batch_size=4):
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def __iter__(self):
        return iter(())


class IterDataset:
    """What Grain's and tf.data's show."""

    def __iter__(self):
        return iter(())


LOADERS = {
    "DataLoader": (DataLoader(Dataset()), r"pass its dataset \(loader.dataset\)"),
    "IterDataset": (IterDataset(), "pass what it reads"),
    "generator": ((x for x in range(3)), "pass what it reads"),
}


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_a_loader_is_refused_wherever_data_go_in(name):
    loader, words = LOADERS[name]
    for use in (refuse_loader, length, lambda x: take(x, [0])):
        with pytest.raises(TypeError, match=f"{name} hands out batches.*{words}"):
            use(loader)


def test_the_front_door_refuses_it_before_anything_is_charged(tmp_path):
    train = scene.training()
    train.init(scene.start())
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(TypeError, match="no Poisson sample"):
        next(iter(train.batches(DataLoader(Dataset()), ledger=path)))
    assert not path.exists() or path.read_text().count("step") == 0


def test_torchs_own_loader_is_refused():
    data = pytest.importorskip("torch.utils.data")
    with pytest.raises(TypeError, match=r"pass its dataset \(loader.dataset\)"):
        length(data.DataLoader(Dataset(), batch_size=4, shuffle=True))


def test_grains_own_loader_is_refused():
    grain = pytest.importorskip("grain.python")
    sampler = grain.SequentialSampler(60, grain.NoSharding())
    with pytest.raises(TypeError, match="no Poisson sample"):
        length(grain.DataLoader(data_source=Dataset(), sampler=sampler))


def test_its_dataset_is_welcome():
    (chunk,) = PoissonSampler(60, 0.1, key=0).chunks(0)
    rows, _ = chunk
    x, y = take(Dataset(), rows)
    drawn = rows >= 0
    np.testing.assert_array_equal(x[drawn, 0], rows[drawn])
    np.testing.assert_array_equal(y[drawn], rows[drawn] % 2)
