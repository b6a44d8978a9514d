"""Groups of processes that train models of their own, in one job of torch."""

import pytest
import torch
from ends import found, of_pair
from group_runs import GROUPS, ended
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

import dynrank
from dynrank.distributed.sharding import shard_frozen
from dynrank.errors import ConfigurationError


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of four processes has found; the first two are a group."""
    program = "import sys, group_runs; group_runs.main(sys.argv[1])"
    return of_pair(program, tmp_path_factory.mktemp("groups"), count=4)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", GROUPS)
def test_each_group_comes_to_what_one_process_does_with_its_batches(results, name, way):
    first = 2 * [*GROUPS].index(name)
    expected = ended(name)
    assert len(expected["history"]) == 3
    for end in found(results[first : first + 2], way):
        assert end["history"] == expected["history"]
        assert_close(end["weights"], expected["weights"], rtol=0, atol=1e-6)


@pytest.fixture
def four_processes():
    """This process thinks that it is one of four, which never talk."""
    torch.distributed.init_process_group("fake", rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


def test_what_no_single_group_trains_is_refused(four_processes):
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 6)), rank=4)
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("groups", "members", "more"))
    with pytest.raises(ConfigurationError, match="a mesh of 2 of 4 processes must have one dimension"):
        shard_frozen(model, mesh["members", "more"])
    groups = [torch.distributed.new_group(members) for members in ([0, 1], [0, 2])]
    halves = [nn.parallel.DistributedDataParallel(nn.Linear(6, 6), process_group=group) for group in groups]
    training = dynrank.Training(nn.Sequential(*halves), [])
    with pytest.raises(ConfigurationError, match=r"different processes train its parts: \[\(0, 1\), \(0, 2\)\]"):
        assert training.group
