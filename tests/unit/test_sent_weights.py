"""Copies of weights, of a reference model or of the weights sent to engines."""

import torch

from vime.backends.megatron.memory.weight_copies import SentWeights, WeightCopy


def test_a_copy_holds_the_routers_bias_though_it_is_no_parameter():
    layer = torch.nn.Module()
    layer.router = torch.nn.Linear(2, 4)
    layer.router.register_buffer("expert_bias", torch.arange(4.0))
    copy = WeightCopy([layer])
    layer.router.expert_bias += 1
    with copy.swapped_in():
        assert torch.equal(layer.router.expert_bias, torch.arange(4.0))
    assert torch.equal(layer.router.expert_bias, torch.arange(4.0) + 1)


def test_a_copy_stays_while_rollouts_of_its_version_may_come():
    layer = torch.nn.Linear(2, 1)
    sent = SentWeights([layer])
    sent.keep(0)
    assert sent.are_current(0)
    assert not sent.are_current(None)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    sent.trained(0, moved=True)
    assert not sent.are_current(0)
    sent.keep(1)
    with sent.copies[0].swapped_in():
        assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before + 1)
    sent.trained(0, moved=True)  # the asynchronous loop: one more rollout of version 0
    assert sorted(sent.copies) == [0, 1]
    sent.trained(1, moved=True)
    assert sorted(sent.copies) == [1]


def test_while_a_critic_trains_alone_copies_do_not_pile_up():
    sent = SentWeights([torch.nn.Linear(2, 1)])
    for version in range(5):
        sent.keep(version)
        sent.trained(version, moved=False)
        assert sent.are_current(version)
    assert list(sent.copies) == [4]
