"""Law 7: two caches, threads or expert vectors on one model; neither can be seen from the other."""

import threading

import torch

from sequences import cut, feed_row, rows_of
from tiny_models import every_cache, every_pattern, main_patterns, new_cache, new_model, shared_expert, shared_model


def decode(model, variant, row, expert, steps=None):
    """Logits of a text read token by token after a prefill of three; `steps` is called between the forwards."""
    cache, found = new_cache(model, variant), []
    for start, piece in zip([0, *range(3, len(row))], cut(row, [3] + [1] * (len(row) - 3)), strict=True):
        given = {"expert_vector": expert} if start == 0 else {}
        found.append(feed_row(model, cache, piece, **given))
        if steps is not None:
            steps()
    return torch.cat(found)


@every_pattern
@every_cache
def test_two_interleaved_caches_give_what_each_gives_alone(pattern, variant):
    model, (row, _, other) = shared_model(pattern), rows_of(pattern, 1)
    expert = shared_expert(pattern, 1)
    before = model.config.to_dict()
    alone = [decode(model, variant, row[:10], expert), decode(model, variant, other, None)]
    caches, found = [new_cache(model, variant) for _ in range(2)], [[], []]
    for start in range(0, 10, 2):
        for which, (tokens, used) in enumerate(((row[:10], expert), (other, None))):
            pieces = [[3], [1], [1, 1]][min(start // 2, 2)]
            done = sum(len(piece) for piece in found[which])
            piece = tokens[done : done + sum(pieces)]
            given = {"expert_vector": used} if start == 0 else {}
            found[which].append(feed_row(model, caches[which], piece, pieces, **given))
    for which in range(2):
        assert torch.equal(torch.cat(found[which]), alone[which])
    assert model.config.to_dict() == before


@main_patterns
@every_cache
def test_two_threads_with_two_experts_give_what_each_gives_alone(pattern, variant):
    """The model is new, so the threads also meet in whatever it prepares when an expert is first used."""
    rows, experts = [rows_of(pattern, seed)[0] for seed in (1, 2, 3)], [shared_expert(pattern, 1), None]
    experts.append(shared_expert(pattern, 2, rank=3))
    alone = [decode(shared_model(pattern), variant, *pair) for pair in zip(rows, experts, strict=True)]
    model, barrier = new_model(pattern), threading.Barrier(3, timeout=60)
    found = [None] * 3

    def work(which):
        torch.set_num_threads(1)
        found[which] = decode(model, variant, rows[which], experts[which], steps=barrier.wait)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)
