"""Chat rendering with the tokenizer's own template, and the cleaning of sampled text.

A principle travels as a system message. Some templates refuse that role and some drop it without a
word, so the template is probed before anything is sampled; where it does not carry the role, the
text goes into the last user turn instead.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from sso_lightning.errors import InputError
from sso_lightning.records import Message

_SYSTEM, _FIRST, _ANSWER, _LAST = "qsystemq", "qfirstq", "qanswerq", "qlastq"


class ChatRenderer:
    """Renders conversations to token ids, the same way for sampling and for training.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        system_role: "auto" folds the system text into the last user turn when the template does
            not carry it; "system" and "fold" demand one way. All three are verified.
        template_kwargs: Passed to the template, such as `{"enable_thinking": false}`.
        extra_stop_ids: Further ids that end a response, such as the generation config's.

    Attributes:
        mode: "system" or "fold".
        template_hash: Changes whenever prompts would be rendered differently.
        stop_ids: The template's end-of-turn id first, then the tokenizer's eos and extra ids.

    Raises:
        InputError: There is no template, it drops text, cannot render several turns, or does not
            carry system text in the demanded way.
    """

    mode: Literal["system", "fold"]

    def __init__(
        self,
        tokenizer: Any,
        system_role: Literal["auto", "system", "fold"] = "auto",
        template_kwargs: dict[str, Any] | None = None,
        extra_stop_ids: Iterable[int] = (),
    ) -> None:
        if system_role not in ("auto", "system", "fold"):
            raise InputError(f"system_role: {system_role!r} is not one of auto, system, fold")
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"the tokenizer {self._name} has no chat template; use a chat model's tokenizer "
                "or set its chat_template"
            )
        if not self._encode(_FIRST):
            raise InputError(
                f"the tokenizer {self._name} turns text into no token; its vocabulary is missing "
                "(tokenizer.json)"
            )
        self.mode = "fold" if system_role == "fold" else "system"
        self._probe((_FIRST,), system=None)
        self._probe((_FIRST, _ANSWER, _LAST), system=None)
        try:
            self._probe_system()
        except InputError:
            if system_role != "auto":
                raise
            self.mode = "fold"
            self._probe_system()
        self._end_of_turn = self._find_end_of_turn()
        eos = tokenizer.eos_token_id
        ids = (self._end_of_turn, *([] if eos is None else [eos]), *extra_stop_ids)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(int(i) for i in ids))
        identity = [
            tokenizer.get_chat_template(),
            self.mode,
            self._kwargs,
            tokenizer.special_tokens_map,
        ]
        text = json.dumps(identity, sort_keys=True, default=str)
        self.template_hash = hashlib.sha256(text.encode()).hexdigest()

    def render(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Render a conversation up to where the assistant's answer begins.

        Args:
            messages: The query; its last turn is the user's.
            system: A principle, joined to the query's own system message, which comes first.

        Returns:
            Token ids, generation prompt included, never truncated.

        Raises:
            InputError: The template refuses the conversation.
        """
        return self._encode(self._text(messages, system))

    def as_text(self, messages: Sequence[Message], system: str | None = None) -> str:
        """The text that `render` turns into token ids."""
        return self._text(messages, system)

    def render_answered(
        self, messages: Sequence[Message], answer: str, system: str | None = None
    ) -> list[int]:
        """Render a conversation with its answer, closed as the template closes it.

        This is what `tokenizer.apply_chat_template` gives for the whole conversation, and what a
        reward model reads.

        Args:
            messages: The query; its last turn is the user's.
            answer: The assistant's last turn.
            system: As in `render`.

        Raises:
            InputError: The template refuses the conversation.
        """
        turns = [*messages, {"role": "assistant", "content": answer}]
        return self._encode(self._text(turns, system, prompt=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response without special tokens and outer white space."""
        # an end-of-turn token need not be marked special, so it is taken off here
        kept = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        text: str = self._tokenizer.decode(
            list(kept), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a response that was not sampled here, end-of-turn id included.

        Sampled responses keep the ids the sampler emitted; the two may differ.
        """
        return [*self._encode(text), self._end_of_turn]

    @property
    def _name(self) -> str:
        return repr(str(getattr(self._tokenizer, "name_or_path", "") or "given"))

    def _encode(self, text: str) -> list[int]:
        # the template has written the special tokens; adding them again would double the BOS
        encoded = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return [int(i) for i in encoded["input_ids"]]

    def _text(self, messages: Sequence[Message], system: str | None, *, prompt: bool = True) -> str:
        own = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = list(messages[1:] if own is not None else messages)
        joined = "\n\n".join(part for part in (own, system) if part)
        if joined and self.mode == "system":
            turns.insert(0, {"role": "system", "content": joined})
        elif joined:
            last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
            turns[last] = {"role": "user", "content": f"{joined}\n\n{turns[last]['content']}"}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=prompt, **self._kwargs
                )
            )
        except Exception as exc:  # a template is a program of the model's author: it may raise any
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(
                f"the chat template of {self._name} cannot render the turns {roles} ({exc})"
            ) from exc

    def _probe(self, contents: Sequence[str], system: str | None) -> None:
        roles = ("user", "assistant", "user")
        turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        text = self._text(turns, system)
        lost = [c for c in (*contents, *([system] if system else [])) if text.count(c) != 1]
        places = [text.find(c) for c in contents]
        if lost or places != sorted(places):
            what = "the system text" if lost == [system] else "a turn's text"
            way = "system_role: fold" if what == "the system text" else "another chat template"
            raise InputError(
                f"the chat template of {self._name} drops, repeats or reorders {what}; use {way}"
            )

    def _probe_system(self) -> None:
        self._probe((_FIRST,), system=_SYSTEM)
        self._probe((_FIRST, _ANSWER, _LAST), system=_SYSTEM)

    def _find_end_of_turn(self) -> int:
        turns = [{"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}]
        tail = self._text(turns, None, prompt=False).rpartition(_ANSWER)[2]
        added = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        # some vocabularies hold runs of white space as added tokens
        marks = (
            i for i in self._encode(tail) if i in added and self._tokenizer.decode([i]).strip()
        )
        found = next(marks, self._tokenizer.eos_token_id)
        if found is None:
            raise InputError(
                f"the tokenizer {self._name} has no end: neither its chat template closes the "
                "assistant's turn with a special token nor is there an eos_token"
            )
        return int(found)


def clean_response(text: str, adjectives: Iterable[str] = ()) -> str:
    """Strip headings by which a response gives its principle away, such as "Helpful response:".

    A heading needs an adjective: one of those in play, or good or bad. So "Response: 404" and
    "Note: ..." stay, and so does everything after the beginning.

    Args:
        text: A decoded response.
        adjectives: Those of the principles the response was sampled under, good and bad.

    Returns:
        The response without such headings and outer white space; perhaps empty.
    """
    words = {"good", "bad", *(word.strip().lower() for word in adjectives if word.strip())}
    one_of = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    adjective = rf"(?:(?:more|most|very|less|least)\s+)?(?:{one_of})"
    title = (
        r"(?:(?:sure|certainly|of course|okay|ok)[,.!]\s*)?"
        r"(?:(?:here(?:\s+is|['\u2019]s)|this\s+is)\s+)?(?:(?:a|an|the|my)\s+)?"
        rf"{adjective}(?:(?:\s*[,/&]\s*|\s*,?\s+and\s+){adjective})*"
        r"\s+(?:response|answer|reply)(?:\s+(?:to|for)\s+(?:your|the|this)\s+(?:question|query|request))?"
    )
    # "Title:" with or without emphasis, or a line of its own that is marked up as a heading
    heading = re.compile(
        rf"[*_#]*\s*{title}[*_]*\s*:[*_]*|[*_#]+\s*{title}[*_]*[ \t]*(?:\n|$)", re.IGNORECASE
    )
    text = text.strip()
    while match := heading.match(text):
        text = text[match.end() :].strip()
    return text
