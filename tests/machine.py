"""The machine that programs on caches run on: its pool of live caches, and a forward that the oracle judges."""

import functools
import itertools
import sys
import tempfile
from collections import Counter

import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
)

from world import (
    VOCAB,
    Ledger,
    Slot,
    Verdict,
    WorldModel,
    as_tensors,
    family_of,
    placed,
    story,
    visible,
)

POOL_SIZE = 4
MOST_ROWS = 4
KEEP = ...  # no `expert_vector=`: what the cache has in force
TOLERANCE = 1e-10
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}

below = functools.cache(lambda stop: st.integers(0, stop - 1))
one_of = functools.cache(st.sampled_from)


class Machine(RuleBasedStateMachine):
    """Live caches of random models, and the steps that rules are made of; `tally` counts operations by kind."""

    tally: Counter
    families: range

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.slots, self.saved = [], []
        self.names = (f"c{n}" for n in itertools.count())

    @initialize(data=st.data())
    def build_models(self, data):
        self.family = family_of(data.draw(one_of(self.families)))
        note(f"family {self.family.seed}: {self.family.fields}")
        self.models = [WorldModel(self.family, which) for which in range(2)]
        self.add_cache(data)

    def teardown(self):
        try:
            sound = sys.exc_info()[0] is None  # else the program has failed before its end
            for slot in self.slots if sound else []:
                self.say("at the end", slot)
                turn = [[story(slot.ledger.tokens(row), 0)] for row in range(len(slot.ledger.rows))]
                if slot.room and turn:
                    self.forward(slot, turn)
        finally:
            self.folder.cleanup()

    # ---- what the rules are made of

    def say(self, kind, slot=None, *details):
        """One line of the printed program."""
        self.kind = kind
        note(" ".join(map(str, ([f"{slot.name} of {slot.model}:"] if slot else []) + [kind, *details])))

    def did(self):
        self.tally[self.kind] += 1

    def pick(self, data, condition=None):
        """A live cache, one that has text unless told otherwise."""
        condition = condition or (lambda slot: slot.ledger.rows)
        fitting = [slot for slot in self.slots if condition(slot)]
        return fitting[data.draw(below(len(fitting)))]

    def any_slot(self, condition=lambda slot: slot.ledger.rows):
        return any(condition(slot) for slot in self.slots)

    def add_slot(self, data, slot):
        if len(self.slots) == POOL_SIZE:
            self.slots.pop(data.draw(below(POOL_SIZE)))
        self.slots.append(slot)

    def add_cache(self, data):
        model = self.models[data.draw(one_of((0, 0, 1)))]
        policy = data.draw(one_of(("recompute", "continue", "reset", "error")))
        storage = self.family.storage
        limit = data.draw(one_of((None, None, 7, 20))) if "policy" not in storage else None
        options = {"on_expert_change": policy, "rollback_reach": data.draw(one_of((0, 0, 1, 3, 8)))}
        options |= storage | ({} if limit is None else {"storage": "static", "max_cache_len": limit})
        if policy == "recompute" and limit is None:
            options["park_bytes"] = data.draw(one_of((0, 2000, 1 << 20)))
        cache = model.module.make_cache(**options)
        slot = Slot(next(self.names), cache, Ledger(policy, limit), model, home=model)
        self.add_slot(data, slot)
        self.say("make_cache", slot, options)

    def attempt(self, slot, verdict, action, refusals=(ValueError, TypeError)):
        """Does `action` and returns `(True, its result)`, or `(False, None)` after a refusal that was in order."""
        before = visible(slot.cache)
        try:
            result = action()
        except refusals as refusal:
            if verdict is Verdict.WORKS:
                raise
            note(f"    refused: {refusal}")
            assert len(str(refusal)) > 10, "the refusal does not say why"
            assert visible(slot.cache) == before, "the refusal changed the cache"
            return False, None
        assert verdict is not Verdict.REFUSES, "this was not refused"
        return True, result

    def forward(self, slot, turn, expert=KEEP, spelling=KEEP, mode="no_grad", is_embedded=False, **options):
        """Feeds a turn and compares the logits; returns them, or `None` after a refusal that was in order.

        A turn has a list of columns for each row, each a token or `None` for a pad.
        """
        ids, mask = as_tensors(turn)
        ledger, model = slot.ledger, slot.model
        if mode == "grad" and self.family.storage.keys() & {"kv_bits", "state_bits"}:
            mode = "no_grad"  # rounding has no gradient
        if spelling is not KEEP:
            options["expert_vector"] = spelling
        wanted = ledger.in_force if expert is KEEP else expert
        verdict = ledger.of_forward(model, wanted, len(turn), ids.shape[1])
        if spelling is not KEEP and model.merged:
            verdict = Verdict.REFUSES
        if options.pop("whole_mask", False):
            earlier = [[column is not None for column in row] for row in ledger.rows] or [[]] * len(turn)
            mask = torch.cat([torch.tensor(earlier, dtype=torch.bool), mask], dim=1)
            options["attention_mask"] = mask.long()
        elif not mask.all():
            options["attention_mask"] = mask.long()
        with MODES[mode]():
            fed = {"inputs_embeds": model.module.model.embed_tokens(ids)} if is_embedded else {"input_ids": ids}
            is_done, output = self.attempt(
                slot, verdict, lambda: model.module(**fed, past_key_values=slot.cache, **options)
            )
        if not is_done:
            return None
        ledger.take_in(model, wanted, turn, is_embedded)
        self.compare(slot, turn, output.logits, options.get("logits_to_keep", 0))
        return output.logits

    def compare(self, slot, turn, logits, kept):
        """Real tokens get the oracle's logits, and a pad those of the real token before it in its turn."""
        columns = range(len(turn[0]))
        columns = columns[-kept:] if isinstance(kept, int) else [columns[n] for n in kept]
        assert logits.shape == (len(turn), len(columns), VOCAB)
        found, wanted = [], []
        for row, fed in enumerate(turn):
            num_real = sum(token is not None for token in fed)
            text = slot.ledger.text(row)
            said = self.family.oracle.logits(text)[len(text) - num_real :]
            heard = list(itertools.accumulate(token is not None for token in fed))
            for place, column in enumerate(columns):
                if heard[column]:
                    found.append(logits[row, place].detach())
                    wanted.append(said[heard[column] - 1])
        if found:
            found, wanted = torch.stack(found), torch.stack(wanted)
            off = (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
            assert off <= TOLERANCE, f"off by {off:.1e} of the logit scale"

    def draw_turn(self, data, slot, widest=5, has_pads=False):
        """A turn that goes on from what the rows say."""
        ledger, width = slot.ledger, 1 + data.draw(below(min(widest, slot.room)))
        num_rows = len(ledger.rows)
        if not num_rows:
            is_per_row = isinstance(ledger.in_force, tuple)
            num_rows = len(ledger.in_force) if is_per_row else 1 + data.draw(below(3))
        turn = []
        for row in range(num_rows):
            is_real = [True] * width
            if has_pads:
                length, side = data.draw(below(width + 1)), data.draw(one_of(("left", "right", "any")))
                is_real = placed(length, width, side, data.draw(below(1000)))
            text, columns = ledger.tokens(row) if ledger.rows else [], []
            for real in is_real:
                if real:
                    text.append(story(text, data.draw(one_of((0, 0, 0, 1, 5))) if text else data.draw(below(VOCAB))))
                columns.append(text[-1] if real else None)
            turn.append(columns)
        return turn

    def perhaps_go_on(self, data, *slots):
        """What an operation did to a cache is seen when it is fed: often that is next."""
        for slot in slots:
            if slot.room and data.draw(one_of((True, True, False))):
                turn = self.draw_turn(data, slot, has_pads=data.draw(one_of((False, False, True))))
                self.say("feed", slot, turn)
                self.forward(slot, turn)
                self.did()

    def draw_expert(self, data, num_rows):
        """One for all or one a row: what it is, and how the user puts it."""
        labels = tuple(self.family.experts)
        if data.draw(one_of((True, True, False))) or not num_rows:
            expert = data.draw(one_of(labels))
            return expert, self.spell(data, expert)
        experts = tuple(data.draw(one_of(labels)) for _ in range(num_rows))
        return experts, [self.spell(data, expert) for expert in experts]

    def spell(self, data, expert):
        spellings = self.family.spellings[expert]
        return spellings[data.draw(below(len(spellings)))]

    def has_room(self):
        return self.any_slot(lambda slot: slot.room)
