import torch
from helpers import gpt2
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_convert.text.collate import IGNORED, CausalCollator, PairCollator, Rows, SpanCollator
from sqa_convert.text.spans import SpanCorruption

EOS = 1


def test_rows_begin_again_and_keep_their_own_numbers():
    rows = Rows(["a", "b", "c"], 7)
    assert [rows[i] for i in range(len(rows))] == list(enumerate("abcabca"))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=20))
def test_positions_begin_again_after_each_end_of_text(ids):
    positions = CausalCollator(EOS)([(0, torch.tensor(ids))])["position_ids"][0].tolist()
    expected, position = [], 0
    for token in ids:
        expected.append(position)
        position = 0 if token == EOS else position + 1
    assert positions == expected


def test_packed_documents_do_not_see_each_other():
    model = gpt2()
    first, second = torch.tensor([5, 6, 7, EOS]), torch.tensor([9, 8, 9, 4, 3])
    batch = CausalCollator(EOS)([(0, torch.cat([first, second]))])
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    apart = torch.cat([model(document[None]).logits[0] for document in (first, second)])
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    together = model(batch["input_ids"], use_cache=False).logits[0]
    assert not torch.allclose(together, apart, atol=1e-3)


def test_the_first_token_of_a_row_is_not_predicted():
    labels = CausalCollator()([(0, torch.arange(5)), (1, torch.arange(5))])["labels"]
    assert labels.tolist() == [[IGNORED, 1, 2, 3, 4]] * 2


def test_what_a_document_begins_with_is_not_predicted_from_the_one_before():
    block = torch.tensor([5, EOS, 6, 7, EOS, 8])
    apart, together = (CausalCollator(end)([(0, block)])["labels"][0].tolist() for end in (EOS, None))
    assert apart == [IGNORED, EOS, IGNORED, 7, EOS, IGNORED] and together == [IGNORED, EOS, 6, 7, EOS, 8]


def test_corruption_of_a_row_does_not_depend_on_its_batch():
    collate = SpanCollator(SpanCorruption(tuple(range(100, 200)), EOS), seed=3)
    rows = [(i, torch.randint(2, 100, (60,))) for i in range(6)]
    together = collate(rows)
    for i, row in enumerate(rows):
        alone = collate([row])
        assert all(torch.equal(together[name][i], alone[name][0]) for name in together)
    other = collate([(77, rows[0][1])])
    assert not torch.equal(other["input_ids"], together["input_ids"][:1])


def test_padding_of_pairs_is_neither_seen_nor_predicted():
    pair = torch.tensor([3, 4]), torch.tensor([5])
    longer = torch.tensor([3, 4, 6, 7]), torch.tensor([5, 8, 9])
    batch = PairCollator(padding=0)([(0, pair), (1, longer)])
    assert batch["input_ids"].tolist() == [[3, 4, 0, 0], [3, 4, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, IGNORED, IGNORED], [5, 8, 9]]
