from hypothesis import given
from hypothesis import strategies as st
from pd_proxy_simulator.text import StopStrings, TextAssembler
from pd_proxy_simulator.tokens import (
    EOS,
    FOLLOWER,
    VOCABULARY,
    VOCABULARY_SIZE,
    advance,
    boundary_states,
    choose,
    detokenize,
    draw,
    start_state,
    tokenize,
)


def continuation(prompt: list[int], count: int, salt: int = 0) -> list[int]:
    _, state = boundary_states(start_state(0), prompt, 16)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(choose(draw(state, salt), tokens[-1], 0))
        state = advance(state, tokens[-1])
    return tokens[len(prompt) :]


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_tokenizing_loses_nothing(text: str) -> None:
    assert detokenize(tokenize(text)) == text


def test_every_token_id_is_in_the_vocabulary() -> None:
    assert len(VOCABULARY) == VOCABULARY_SIZE > EOS
    assert all(token < VOCABULARY_SIZE for token in tokenize("Ünïcode, words\tand \U0001f680 <|end|>"))


@given(st.text(min_size=1, alphabet=st.characters(codec="utf-8")), st.integers(1, 39))
def test_a_continuation_of_part_of_an_answer_is_the_rest_of_it(text: str, cut: int) -> None:
    prompt = tokenize(text)
    whole = continuation(prompt, 40)
    assert continuation(prompt + whole[:cut], 40 - cut) == whole[cut:]


def test_another_prompt_and_another_salt_lead_to_other_answers() -> None:
    prompt = tokenize("one prompt")
    answers = {tuple(continuation(prompt, 20)), tuple(continuation(tokenize("another prompt"), 20))}
    answers |= {tuple(continuation(prompt, 20, salt)) for salt in (1, 2)}
    assert len(answers) == 4


def test_states_at_block_edges_do_not_depend_on_where_the_prompt_ended() -> None:
    tokens = tokenize("a long enough prompt, so that it has some blocks " * 3)
    long, _ = boundary_states(start_state(0), tokens, 16)
    short, _ = boundary_states(start_state(0), tokens[:40], 16)
    assert short == long[: len(short)]


def test_a_split_character_is_held_back_until_it_is_whole() -> None:
    answer = continuation(tokenize("a prompt"), 400)
    assembler = TextAssembler()
    pieces = [assembler.push(token) for token in answer]
    incomplete = [piece for token, piece in zip(answer, pieces, strict=True) if token in FOLLOWER]
    assert incomplete
    assert set(incomplete) == {""}
    held_at_the_end = answer[-1] in FOLLOWER
    assert held_at_the_end or "".join(pieces) == detokenize(answer)
    assert "\ufffd" not in "".join(pieces)


def test_the_rest_of_a_character_that_began_in_the_prompt_is_lost() -> None:
    lead = next(token for token, after in FOLLOWER.items() if after not in FOLLOWER)
    assembler = TextAssembler()
    first = assembler.push(FOLLOWER[lead])
    assert "\ufffd" not in first
    assert not first.startswith(VOCABULARY[lead].decode("utf-8", "ignore") or "\0")


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_a_stop_string_is_found_however_the_text_is_cut(text: str, stop: str, piece: int, include: bool) -> None:
    stops = StopStrings([stop], include=include)
    shown, met = "", None
    for at in range(0, len(text), piece):
        more, met = stops.push(text[at : at + piece], armed=True)
        shown += more
        if met:
            break
    else:
        shown += stops.flush()
    if stop in text:
        assert met == stop
        assert shown == text[: text.index(stop) + (len(stop) if include else 0)]
    else:
        assert (met, shown) == (None, text)
