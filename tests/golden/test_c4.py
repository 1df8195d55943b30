"""Every rule of C4 and its edges, as TensorFlow Datasets c4 3.0.1 applies them."""

import hashlib
import re
import sys
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.document import Document, Run, identity
from data_pipeline.filters.c4 import (
    C4_VARIANTS,
    C4Lines,
    C4Options,
    LineEdit,
    clean_lines,
    enough_sentences,
    line_key,
)
from data_pipeline.step import Dropped, Kept
from data_pipeline.text.sentences import SENTENCES

C4 = C4_VARIANTS["c4"]
ONE = C4Options(min_sentences=1)
GOOD = "This line has five words."
PAGE = f"{GOOD}\n{GOOD}\n{GOOD}"


def cleaned(text: str, options: C4Options = ONE) -> str | None:
    """Return the text that is left, None if nothing passes; check the runs and the balance."""
    edit = clean_lines(text, options)
    if isinstance(edit, Dropped):
        return None
    check(edit, text)
    return edit.text


def check(edit: LineEdit, text: str) -> None:
    """Assert that runs point at equal stretches in order, and that characters balance."""
    final = extracted = 0
    for run in edit.runs:
        assert run.length > 0
        assert run.final_start >= final
        assert run.extracted_start >= extracted
        final, extracted = run.final_start + run.length, run.extracted_start + run.length
        assert edit.text[run.final_start : final] == text[run.extracted_start : extracted]
    kept = sum(run.length for run in edit.runs)
    assert final <= len(edit.text)
    assert edit.inserted == len(edit.text) - kept
    assert all(count > 0 for count in edit.deleted.values())
    assert len(text) == len(edit.text) + sum(edit.deleted.values()) - edit.inserted


def document(text: str, language: str = "") -> Document:
    return Document(id="0", source="s", text=text, edits=identity(text), language=language)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("This line ends with stop.", True),
        ("Does this line end well?", True),
        ("This line ends very well!", True),
        ('He said "this ends well"', True),
        ("This line ends without mark", False),
        ("This line ends with colon:", False),
        ("This line ends with ellipsis...", False),
        ("This line ends with four....", False),
        ("This line ends with two..", True),
        ("This line ends with ellipsis\N{HORIZONTAL ELLIPSIS}", False),
        ("This line ends with apostrophe'", False),
        (
            "This line ends in a quote\N{RIGHT DOUBLE QUOTATION MARK}",
            False,
        ),
        ("This line ends in Chinese\N{IDEOGRAPHIC FULL STOP}", False),
        ("This ends in a bracket.)", False),
    ],
)
def test_end_marks(line: str, kept: bool) -> None:
    assert cleaned(line) == (line if kept else None)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Only four words here.", False),
        ("Now exactly five words here.", True),
        ("Five\tare\N{NO-BREAK SPACE}set\N{IDEOGRAPHIC SPACE}apart\N{EM SPACE}so.", True),
        ("a b c d .", True),
        ("hyphen-ated words count once only.", True),
    ],
)
def test_at_least_five_words_between_white_space(line: str, kept: bool) -> None:
    assert cleaned(line) == (line if kept else None)


@pytest.mark.parametrize(("length", "kept"), [(1000, True), (1001, False)])
def test_lines_with_a_word_of_more_than_1000_characters_go(length: int, kept: bool) -> None:
    line = f"A line with one long {'x' * (length - 1)}."
    assert cleaned(line) == (line if kept else None)


def test_long_words_are_looked_for_before_citations_go() -> None:
    line = f"A line with one long {'x' * 998}[1]."  # 1,002 characters, 999 without the citation
    assert cleaned(line) is None


def test_citations_are_deleted_and_the_line_not_stripped_again() -> None:
    cited = "[1] This was cited[2] right here[citation needed] by[] hand[edit]."
    text = f"{GOOD}\n{cited}\nAnd [a] five words [12]."
    edit = clean_lines(text, ONE)
    assert isinstance(edit, LineEdit)
    check(edit, text)
    assert edit.text.split("\n")[1] == " This was cited right here by hand."
    assert edit.text.split("\n")[2] == "And [a] five words ."
    assert edit.deleted["c4.citation"] == len("[1][2][citation needed][][edit][12]")


def test_digits_of_any_script_make_a_citation_and_brackets_of_other_text_stay() -> None:
    assert (
        cleaned("These five words stay[٣] here[Edit] now.")
        == "These five words stay here[Edit] now."
    )


def test_a_citation_at_the_end_leaves_what_the_end_mark_is_tested_on() -> None:
    assert cleaned("This line has five words.[1]") == GOOD
    assert cleaned("This line has five words. [1]") is None  # ends with a blank now


def test_words_are_counted_after_citations_went() -> None:
    assert cleaned("One two [1] three four.") is None


def test_the_page_is_stripped_at_the_end() -> None:
    assert cleaned(f"[1] {GOOD}\n[2] {GOOD}") == f"{GOOD}\n {GOOD}"


@pytest.mark.parametrize("rule", ["lorem_ipsum", "curly_bracket"])
def test_page_killers_drop_the_page_only_from_lines_that_survived(rule: str) -> None:
    words = {"lorem_ipsum": "Some LOREM Ipsum here", "curly_bracket": "a function with { bracket"}
    killer = words[rule]
    assert clean_lines(f"{PAGE}\n{killer} stands at the end.", C4) == Dropped(f"c4.{rule}")
    assert cleaned(f"{PAGE}\n{killer} without an end mark", C4) == PAGE
    assert (
        cleaned(f"{PAGE}\n{'{' if rule == 'curly_bracket' else 'lorem ipsum'} few words.", C4)
        == PAGE
    )
    assert cleaned(f"{PAGE}\n{killer} and {'x' * 1001}.", C4) == PAGE


def test_order_of_the_tests_inside_a_line() -> None:
    assert clean_lines("javascript and lorem ipsum stand here.", ONE) == Dropped("c4.lorem_ipsum")
    assert cleaned(f"{GOOD}\nJavaScript stands before a {{ here.") == GOOD  # line goes, page stays
    both = clean_lines("our privacy policy has a { here.", ONE)
    assert both == Dropped("c4.curly_bracket")


def test_a_closing_bracket_is_never_tested() -> None:
    assert cleaned("a function ends with } here.") == "a function ends with } here."


@pytest.mark.parametrize(
    "phrase",
    [
        "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
        "use cookies", "Terms Of Use", "we reuse cookies",
    ],
)  # fmt: skip
def test_policy_lines_go(phrase: str) -> None:
    assert cleaned(f"{GOOD}\nHere you find the {phrase} again.") == GOOD


def test_javascript_lines_go_anywhere_in_a_word() -> None:
    assert cleaned(f"{GOOD}\nPlease enable MyJavaScriptThing to read this.") == GOOD


@pytest.mark.parametrize(
    "separator",
    ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"],
)
def test_every_line_break_of_splitlines_separates(separator: str) -> None:
    text = separator.join([GOOD, "dropped", GOOD, GOOD]) + separator
    edit = clean_lines(text, C4)
    assert isinstance(edit, LineEdit)
    check(edit, text)
    assert edit.text == PAGE
    assert edit.inserted == (0 if separator.endswith("\n") else 2)


def test_lines_are_stripped_of_all_white_space() -> None:
    assert cleaned(f"\N{NO-BREAK SPACE}\t {GOOD}\N{IDEOGRAPHIC SPACE}\n") == GOOD


def test_a_page_needs_three_sentences_in_all() -> None:
    assert clean_lines(f"{GOOD}\n{GOOD}", C4) == Dropped("c4.few_sentences")
    two_in_one = "This is the first one. And here is the second."
    assert cleaned(f"{two_in_one}\n{GOOD}", C4) == f"{two_in_one}\n{GOOD}"
    assert clean_lines("We met Dr. Smith and Mr. Jones at home.", C4) == Dropped("c4.few_sentences")
    assert clean_lines("", C4) == Dropped("c4.few_sentences")


def test_what_lines_lose_is_counted_by_rule() -> None:
    lines = [GOOD, "short line.", "no end mark", f"  {GOOD} ", "use cookies for all of us."]
    edit = clean_lines("\n".join(lines), ONE)
    assert isinstance(edit, LineEdit)
    assert edit.deleted == {
        "c4.few_words": len("short line.\n"),
        "c4.no_end_mark": len("no end mark\n"),
        "c4.policy": len(lines[-1]),
        "c4.whitespace": len("  ") + len(" \n"),
    }


def test_variants_differ_where_their_tools_do() -> None:
    assert C4_VARIANTS["c4_fast"].sentences == "rules"
    three = "Three words here.\nThree words here.\nThree words here."
    assert clean_lines(three, C4) == Dropped("c4.few_sentences")
    assert cleaned(three, C4_VARIANTS["dolma"]) == three
    assert clean_lines(three, C4_VARIANTS["datatrove"]) == Dropped("c4.few_sentences")
    five = "\n".join(["Three words here."] * 5)
    assert cleaned(five, C4_VARIANTS["datatrove"]) == five
    unmarked = "\n".join(["Three words here"] * 5)
    assert cleaned(unmarked, C4_VARIANTS["fineweb"]) == unmarked


def test_the_datatrove_variants_have_its_end_marks_and_count_words_before_citations_go() -> None:
    datatrove = replace(C4_VARIANTS["datatrove"], min_sentences=1)
    assert cleaned("Three words here'", datatrove) == "Three words here'"
    assert cleaned("Three words here'") is None
    assert cleaned("Two words[1] [2].", datatrove) == "Two words ."
    assert cleaned("Two [1] words.", replace(datatrove, cited_words=False)) is None
    assert cleaned("Two [1] words.", datatrove) == "Two  words."
    fineweb = replace(C4_VARIANTS["fineweb"], min_sentences=1)
    assert cleaned("[1] [2] [3]\nThree words here...", fineweb) == "Three words here..."
    assert cleaned("Three words here\n[1] [2] [3]\nThree more words", fineweb) == (
        "Three words here\n  \nThree more words"
    )


def test_phrases_are_found_in_lower_case_as_python_lowers() -> None:
    ascii_letters = [
        character
        for character in map(chr, range(128, 0x1F000))  # beyond, nothing has a case
        if any(part < "\x80" for part in character.lower())
    ]
    assert ascii_letters == ["\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}", "\N{KELVIN SIGN}"]
    assert cleaned(f"{GOOD}\nThey use COO\N{KELVIN SIGN}IES on this page.") == GOOD
    dotted = "Our pr\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}vacy policy is here."
    assert cleaned(dotted) == dotted  # its lower case has a mark after the i


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("a lorem lorem ipsum is here.", "lorem_ipsum"),
        ("a javajavascript line is here.", "javascript"),
        ("the use of use cookies is here.", "policy"),
        ("privacy privacy policy is here now.", "policy"),
        ("use of uses cookies is here.", "policy"),
        ("terms of terms of use are here.", "policy"),
        ("lorem  ipsum is here no more.", ""),
        ("lore[1]m ip[2]sum is here now.", "lorem_ipsum"),
        ("use of cookie policies is here.", ""),
        ("cookie privacy policiy is here now.", ""),
    ],
)
def test_phrases_that_begin_like_others(line: str, rule: str) -> None:
    edit = clean_lines(f"{GOOD}\n{line}", ONE)
    if rule == "lorem_ipsum":
        assert edit == Dropped("c4.lorem_ipsum")
    else:
        assert isinstance(edit, LineEdit)
        assert set(edit.deleted) - {"c4.whitespace", "c4.citation"} == ({f"c4.{rule}"} - {"c4."})


def test_findings_name_every_rule_even_after_a_page_is_lost() -> None:
    page = document(f"{GOOD}\nThis {'{'} drops the page.\nno end\nuse cookies if you want to.")
    found = {each.rule: each for each in C4Lines().findings(page)}
    assert (found["c4.curly_bracket"].value, found["c4.curly_bracket"].passed) == (1, False)
    assert found["c4.lorem_ipsum"].passed
    assert (found["c4.few_sentences"].value, found["c4.few_sentences"].passed) == (1, False)
    assert found["c4.few_sentences"].limit == "at least 3"
    assert found["c4.no_end_mark"].value == len("no end\n")
    assert found["c4.policy"].value == len("use cookies if you want to.")
    good = {each.rule: each for each in C4Lines().findings(document(PAGE))}
    assert all(each.passed for each in good.values())
    assert good["c4.few_sentences"].value == 3


def test_the_step_composes_the_edit_map() -> None:
    extracted = f"Menu\n{GOOD}\n[3]{GOOD}\nfoot\n{GOOD} "
    shown = document(extracted[5:])
    start = Document(id="0", source="s", text=shown.text, edits=(Run(0, 5, len(shown.text)),))
    verdict = C4Lines()(start)
    assert isinstance(verdict, Kept)
    assert verdict.document.text == PAGE
    for run in verdict.document.edits:
        there = extracted[run.extracted_start :][: run.length]
        assert verdict.document.text[run.final_start :][: run.length] == there


def test_line_keys_ignore_case_and_margins() -> None:
    assert line_key("  A Line. ") == hashlib.md5(b"a line.").digest()
    assert line_key("A\u2028line") == hashlib.md5("a\u2028line".encode()).digest()


def test_sentences_of_a_whole_text_may_join_over_lines() -> None:
    text = "He went to see Dr.\nSmith in town.\nAnd so did we."
    assert not enough_sentences(text)
    assert enough_sentences(text, minimum=2)


@pytest.mark.parametrize("counter", list(SENTENCES))
@given(text=st.text(alphabet="aB.!? \"')(\n1", max_size=60), limit=st.integers(1, 4))
def test_counting_up_to_a_limit_agrees_with_counting_all(
    counter: str, text: str, limit: int
) -> None:
    assert SENTENCES[counter](text, limit) == min(SENTENCES[counter](text, 1000), limit)


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [GOOD, f" {GOOD}", "[1] And [2]five words are here.", "x", "", "a{b c d e."]
        ),
        st.text(alphabet='ab. [1]"{}\t\u00a0é', max_size=30),
    ),
    max_size=8,
)
BREAKS = st.sampled_from(["\n", "\r\n", "\r", "\v", "\u2028", "\x1c"])


@settings(max_examples=150)
@given(
    lines=LINES,
    breaks=st.lists(BREAKS, min_size=8, max_size=8),
    variant=st.sampled_from(list(C4_VARIANTS)),
)
def test_runs_hold_for_any_text(lines: list[str], breaks: list[str], variant: str) -> None:
    text = "".join(line + end for line, end in zip(lines, breaks, strict=False))
    once = cleaned(text, C4_VARIANTS[variant])
    if once is not None and "[" not in text:
        assert cleaned(once, C4_VARIANTS[variant]) == once


def reference(text: str, options: C4Options) -> tuple[str | None, str]:
    """Clean a text with C4's line rules, written down one after the other."""
    kept = []
    policy = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
              "use cookies")  # fmt: skip
    for raw in text.splitlines():
        stripped = raw.strip()
        if any(len(word) > options.max_word_characters for word in stripped.split()):
            continue
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", stripped)
        marks = tuple(options.end_marks)
        if marks and (not line.endswith(marks) or line.endswith("...")):
            continue
        counted = stripped if options.cited_words else line
        if len(counted.split()) < options.min_words:
            continue
        if "lorem ipsum" in line.lower():
            return None, "c4.lorem_ipsum"
        if "javascript" in line.lower():
            continue
        if "{" in line:
            return None, "c4.curly_bracket"
        if any(phrase in line.lower() for phrase in policy):
            continue
        kept.append(line)
    count = SENTENCES[options.sentences]
    if sum(max(1, count(line, 1000)) for line in kept) < options.min_sentences:
        return None, "c4.few_sentences"
    return "\n".join(kept).strip(), ""


def rule_reference(text: str) -> int:
    """Count sentences by the rules of ``rule_sentences``, with one expression for all of them."""
    breaks = re.compile(r"(\w+(?:\.\w+)*)?([.?!]+)[\"'’”)\]}]*\s+(?=(\S))")
    count = 1 if text.strip() else 0
    for word, marks, following in breaks.findall(text) if count else []:
        initial = len(word) == 1 and word.isalpha()
        if marks == "." and (initial or word.lower() in ("dr", "mr", "u.s", "e.g", "p.m", "ph.d")):
            continue
        count += not (marks.startswith("..") and following.islower())
    return count


SENTENCE_PARTS = st.sampled_from(
    ["a", "U.S.", "Mr.", "Dr", " ", "\n", ".", "..", "?", "!", '"', ")", "abcdefgh", "x.y", "1.5",
     "É", "p.m.", "_", "..."]
)  # fmt: skip


@settings(max_examples=300)
@given(text=st.lists(SENTENCE_PARTS, max_size=14).map("".join))
def test_sentences_are_counted_by_the_rules(text: str) -> None:
    assert SENTENCES["rules"](text, 1000) == rule_reference(text)


FRAGMENTS = st.sampled_from(
    [
        GOOD, "One two three. Four five. Six!", "word ", "[1]", "[", "]", "[edit]", "[edit",
        "[12", "[citation needed]", "...", ".", "?", "! ", '"', "'", "lorem ipsum ", "lorem ",
        "javascript", "{", "use cookies ", "use of ", "cooKies ", "privacy policy ", "\n", "\r\n",
        "\r", "\x0b", "\u2028", "\x1f", "\xa0", " ", "x" * 14, "日本。", "٣", "é",
    ]
)  # fmt: skip


@settings(max_examples=300)
@given(
    text=st.lists(FRAGMENTS, max_size=40).map("".join),
    variant=st.sampled_from([*C4_VARIANTS]),
    limit=st.sampled_from([1000, 12]),
)
def test_the_kernel_does_what_the_rules_say(text: str, variant: str, limit: int) -> None:
    options = replace(C4_VARIANTS[variant], max_word_characters=limit)
    edit = clean_lines(text, options)
    if isinstance(edit, Dropped):
        assert reference(text, options) == (None, edit.reason)
    else:
        check(edit, text)
        assert reference(text, options) == (edit.text, "")


def test_python_splits_lines_where_the_rules_assume() -> None:
    breaks = [chr(c) for c in range(sys.maxunicode + 1) if len(f"{chr(c)}b".splitlines()) == 2]
    assert breaks == list("\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029")
    assert all(character.isspace() for character in breaks)
    assert unicodedata.category("\N{HORIZONTAL ELLIPSIS}") == "Po"


@pytest.mark.parametrize("counter", list(SENTENCES))
@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("No mark at all", 1),
        ("One. Two? Three! four.", 4),
        ('He said "No." Then he left. (He did.) Well.', 4),
        ("Mr. Smith of the U.S. Army met Dr. J. Jones.", 1),
        ("It costs 3.50 at a.b.org, say.", 1),
        ("Wait... what was that? He paused... The door opened.", 3),
        ("Oh no!!! It was over.", 2),
    ],
)
def test_both_counters_count_alike(counter: str, text: str, sentences: int) -> None:
    assert SENTENCES[counter](text, 100) == sentences
