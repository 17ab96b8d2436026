"""Talking to a model in the terminal."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.zoo.eacm.dialogues import WORDS
from tests.zoo.eacm.test_eacm import SMALL
from zoo.eacm.chat import Chat, load_model, main
from zoo.eacm.eacm import EACM, EmoEmb, Seq2Seq
from zoo.eacm.steered import SteeredLM
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from zoo.eacm.dialogue_module import DialogueModule

NAMES = ["calm", "joy", "anger"]


def words(model: Any, names: list[str] | None = None) -> Any:
    """A model that knows w5 ... and the separator at 4."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    table = ["[PAD]", "[UNK]", "[EOS]", "[GO]", "[SEP]", *(f"w{index}" for index in range(5, WORDS))]
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(table)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    model.vocabulary_ = DialogueVocabulary(tokenizer, tokenizer, NAMES if names is None else names)
    return model


def machine(kind: type[DialogueModule] = EACM, **options: Any) -> Any:
    torch.manual_seed(0)
    made: Any = words(kind(**{**SMALL, **options}))
    # Large weights, so that replies differ from each other.
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_()
    return made


def save(model: Any, path: Path, **without: Any) -> str:
    """A checkpoint as a Trainer writes it."""
    content: dict[str, Any] = {
        "state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0",
        "hyper_parameters": dict(model.hparams),
    }  # fmt: skip
    model.on_save_checkpoint(content)
    torch.save({**content, **without}, path)
    return str(path)


class Recorder(Chat):
    """Keeps what the model was asked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked: list[dict[str, Any]] = []
        answer = self.module.answer

        def spy(batch: Any, emotion: Any = None, **options: Any) -> Any:
            self.asked.append({"post": batch.post_text[0], "ids": batch.post_ids[0].tolist(), "emotion": emotion})
            self.asked[-1].update(options)
            return answer(batch, emotion=emotion, **options)

        self.module.answer = spy  # type: ignore[method-assign]


def test_a_post_is_answered_with_the_reply_of_the_model_its_emotion_and_a_bar_for_each() -> None:
    chat = Chat(machine(emotion_head="softmax"))
    lines = chat.respond("w5 w6").splitlines()
    ids, mask = chat.module.vocabulary.encode_posts(["w5 w6"])
    module: Any = chat.module
    shares = module.choose(ids, mask)[1]
    reply = module.generate(ids, mask, shares).tokens[0, 0]
    assert lines[0].split() == [f"w{token}" for token in reply.tolist() if token > 2]
    assert lines[1] == f"emotion: {NAMES[int(shares.argmax())]} (chosen by the model)"
    assert [line.split()[0] for line in lines[2:]] == NAMES
    assert [line.split()[-1] for line in lines[2:]] == [f"{share:.2f}" for share in shares[0].tolist()]
    assert [line.count("#") for line in lines[2:]] == [round(20 * share) for share in shares[0].tolist()]
    assert len({len(line) for line in lines[2:]}) == 1


def test_a_forced_emotion_steers_until_the_model_chooses_again() -> None:
    chat = Recorder(machine())
    assert "joy    #################### 1.00" in chat.respond("/emotion JOY")
    forced = chat.respond("w5")
    assert "emotion: joy (as you asked)" in forced
    assert chat.respond("/emotion auto") == "The model chooses the emotion."
    assert "(chosen by the model)" in chat.respond("w5")
    assert chat.asked[0]["emotion"].tolist() == [0, 1, 0]
    assert chat.asked[1]["emotion"] is None


@pytest.mark.parametrize(
    ("head", "text", "expected"),
    [
        ("softmax", "joy=0.6 anger=0.2", [0, 0.75, 0.25]),
        ("sigmoid", "joy=0.6 anger=0.2", [0, 0.6, 0.2]),
        ("sigmoid", "calm = 1, anger = .5", [1, 0, 0.5]),
    ],
)
def test_a_mixture_sums_to_one_only_where_emotions_exclude_each_other(
    head: str, text: str, expected: list[float]
) -> None:
    chat = Recorder(machine(emotion_head=head))
    chat.respond(f"/emotion {text}")
    chat.respond("w5")
    assert chat.asked[0]["emotion"].tolist() == pytest.approx(expected)


def test_names_of_several_words_are_understood() -> None:
    chat = Recorder(words(machine(), ["no emotion", "joy", "great anger"]))
    chat.respond("/emotion no emotion")
    chat.respond("w5")
    chat.respond("/emotion no emotion=0.5 great anger=1")
    chat.respond("w5")
    assert [asked["emotion"].tolist() for asked in chat.asked] == [[1, 0, 0], [0.5, 0, 1]]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/emotion happy", "There is no emotion 'happy': type one of calm, joy, anger, or auto."),
        ("/emotion joy anger", "There is no emotion 'joy anger': type one of calm, joy, anger, or auto."),
        ("/emotion joy=1 fear=1", "There is no emotion 'fear': type one of calm, joy, anger, or auto."),
        ("/emotion joy=1 anger", "There is no emotion 'anger': type one of calm, joy, anger, or auto."),
        ("/emotion joy=2", "A share must be a number from 0 to 1, as in joy=0.7, got joy=2."),
        ("/emotion joy=much", "A share must be a number from 0 to 1, as in joy=0.7, got joy=much."),
        ("/emotion joy=nan", "A share must be a number from 0 to 1, as in joy=0.7, got joy=nan."),
        ("/emotion joy=", "A share must be a number from 0 to 1, as in joy=0.7, got joy=."),
        ("/emotion joy=0", "A mixture needs a share above 0."),
        ("/beam x", "/beam takes a whole number from 1 to 100, as in /beam 5, got 'x'."),
        ("/beam 2.5", "/beam takes a whole number from 1 to 100, as in /beam 5, got '2.5'."),
        ("/beam 1000", "/beam takes a whole number from 1 to 100, as in /beam 5, got '1000'."),
        ("/sample 0", "/sample takes a temperature above 0, as in /sample 0.8, got '0'."),
        ("/sample inf", "/sample takes a temperature above 0, as in /sample 0.8, got 'inf'."),
        ("/all", "There is no post yet: type one, or /all POST."),
        ("  ", "Type a post, or /help."),
    ],
)
def test_what_is_wrong_with_a_line_is_its_answer_and_changes_nothing(line: str, answer: str) -> None:
    chat = Recorder(machine())
    assert chat.respond(line) == answer
    assert chat.asked == []
    chat.respond("w5")
    assert chat.asked == [{"post": "w5", "ids": [5], "emotion": None, "seed": 0, "num_return": 1}]


def test_an_unknown_command_is_answered_with_those_there_are() -> None:
    answer = Chat(machine()).respond("/mood joy")
    assert answer.startswith("There is no command /mood; there are /emotion, /all")
    help_text = Chat(machine()).respond("/help")
    for command in ("/emotion", "/all", "/greedy", "/beam", "/sample", "/context", "/help", "/quit"):
        assert command in answer
        assert command in help_text


def test_posts_without_a_known_word_are_not_answered_and_unknown_words_are_named() -> None:
    chat = Recorder(machine())
    for post in ("hello there", "[SEP]", "hello [SEP] there"):
        assert chat.respond(post).startswith("The model knows no word of this post")
        assert chat.respond(f"/all {post}").startswith("The model knows no word of this post")
    assert chat.asked == []
    assert chat.respond("hello w5 there hello").splitlines()[-1] == "(not known: hello, there)"
    assert "not known" not in chat.respond("w5")


def test_the_last_words_of_a_long_post_are_read() -> None:
    chat = Recorder(machine(), max_post_length=3)
    chat.respond("w5 w6 w7 w8 w9")
    assert chat.asked[0]["ids"] == [7, 8, 9]
    assert chat.respond("w5 no one of these").startswith("The model knows no word")
    with pytest.raises(ValueError, match="max_post_length must be at least 1, got 0"):
        Chat(machine(), max_post_length=0)


def test_words_are_chosen_as_was_asked() -> None:
    chat = Recorder(machine(), 30)
    for line in ("/beam 4", "w5", "/sample 0.5", "w5", "/greedy", "w5", "/beam", "w5", "/sample", "w5"):
        chat.respond(line)
    kept = ("decoding", "beam_size", "temperature")
    assert [{name: asked[name] for name in kept if name in asked} for asked in chat.asked] == [
        {"decoding": "beam", "beam_size": 4},
        {"decoding": "sample", "temperature": 0.5},
        {"decoding": "greedy"},
        {"decoding": "beam", "beam_size": 5},
        {"decoding": "sample", "temperature": 1.0},
    ]


def test_the_same_post_drawn_again_has_another_reply_and_a_conversation_can_be_repeated() -> None:
    def replies() -> list[str]:
        chat = Chat(machine())
        chat.respond("/sample 3")
        return [chat.respond("w5").splitlines()[0] for _ in range(6)]

    first = replies()
    assert len(set(first)) > 3
    assert replies() == first


def test_replies_under_every_emotion_are_those_of_the_forced_ones() -> None:
    chat = Chat(machine())
    chat.respond("w5 w6")
    listed = [line.split(maxsplit=1) for line in chat.respond("/all").splitlines()]
    assert [name for name, _ in listed] == NAMES
    assert len({reply for _, reply in listed}) > 1
    for name, reply in listed:
        chat.respond(f"/emotion {name}")
        assert chat.respond("w5 w6").splitlines()[0] == reply
    assert chat.respond("/all w7") != chat.respond("/all")


def test_with_context_the_turns_so_far_are_part_of_the_post() -> None:
    chat = Recorder(machine())
    chat.respond("w5")
    chat.respond("/context")
    reply = chat.respond("w6").splitlines()[0]
    chat.respond("w7")
    assert [asked["post"] for asked in chat.asked] == ["w5", "w6", f"w6 [SEP] {reply} [SEP] w7"]
    assert chat.asked[-1]["ids"].count(4) == 2
    chat.respond("/all")
    assert chat.asked[-1]["post"] == chat.asked[2]["post"]
    assert chat.respond("/context") == "Each post stands alone."
    chat.respond("w8")
    chat.respond("/context")
    chat.respond("w9")
    assert [asked["post"] for asked in chat.asked[-2:]] == ["w8", "w9"]


def test_a_model_that_takes_no_emotion_says_so() -> None:
    chat = Chat(machine(Seq2Seq))
    assert "without an emotion" in chat.greeting
    for line in ("/emotion joy", "/emotion", "/emotion auto", "/all w5"):
        assert chat.respond(line) == "Seq2Seq takes no emotion: there is nothing to choose."
    assert len(chat.respond("w5").splitlines()) == 1


def test_a_model_that_is_told_the_emotion_asks_for_it() -> None:
    chat = Chat(machine(EmoEmb))
    asks = "EmoEmb replies with the emotion it is given: type /emotion with one of calm, joy, anger."
    assert chat.respond("w5") == asks
    assert chat.respond("/emotion auto").startswith("EmoEmb does not choose")
    assert "or auto" not in chat.respond("/emotion happy")
    assert "not set yet" in chat.respond("/emotion")
    chat.respond("/emotion anger")
    assert "set by you" in chat.respond("/emotion")
    assert "emotion: anger (as you asked)" in chat.respond("w5")


def test_a_model_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="this EACM knows no words"):
        Chat(EACM(**SMALL))


@pytest.mark.parametrize("kind", [EACM, Seq2Seq, EmoEmb, SteeredLM])
def test_a_checkpoint_says_of_which_model_it_is(kind: type[DialogueModule], tmp_path: Path) -> None:
    options = {} if kind is not SteeredLM else {"emotion_size": None, "num_layers": 1}
    sizes = {name: size for name, size in {**SMALL, **options}.items() if size is not None}
    path = save(words(kind(**sizes)), tmp_path / "best.ckpt")
    assert type(load_model(path)) is kind
    assert type(load_model(path, kind.__name__)) is kind
    with pytest.raises(ValueError, match=f"is a checkpoint of {kind.__name__}, not of ECM: leave --model out"):
        load_model(path, "ECM")


def test_a_checkpoint_that_does_not_say_is_of_the_model_that_is_named(tmp_path: Path) -> None:
    path = save(machine(Seq2Seq), tmp_path / "best.ckpt", dialogue_model=None)
    assert type(load_model(path, "Seq2Seq")) is Seq2Seq
    with pytest.raises(ValueError, match=r"is no checkpoint of EACM \(.*; say of which model with --model, one of"):
        load_model(path)
    named = save(machine(), tmp_path / "tagger.ckpt", dialogue_model="EmotionTagger")
    with pytest.raises(ValueError, match=r"is a checkpoint of EmotionTagger, which does not reply; expected one of"):
        load_model(named)
    by_path = save(
        machine(), tmp_path / "cli.ckpt", dialogue_model=None, hyper_parameters={"_class_path": "zoo.SASRec"}
    )
    with pytest.raises(ValueError, match=r"is a checkpoint of SASRec, which does not reply"):
        load_model(by_path)


def test_a_conversation_is_read_from_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(machine(), tmp_path / "best.ckpt")
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5\n/emotion joy\nw5\n/quit\nw6\n"))
    main(["--checkpoint", path])
    said = capsys.readouterr().out
    assert said.startswith("EACM chooses among the emotions calm, joy, anger.")
    assert said.count("> w5\n") == 2
    assert "> w6" not in said
    assert "emotion: joy (as you asked)" in said
    assert said.endswith("> /quit\nGoodbye.\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5\n"))
    main(["--checkpoint", path, "--max-post-length", "2"])
    assert "> w5\n" in capsys.readouterr().out


def test_a_conversation_in_a_terminal_ends_with_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(machine(), tmp_path / "best.ckpt")
    typed = iter(["w5", "/emotion joy"])

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    main(["--checkpoint", path])
    said = capsys.readouterr().out
    assert "(chosen by the model)" in said
    assert "Replies have this emotion from now on" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt: no such checkpoint file"),
        (["--checkpoint", "best.ckpt", "--max-post-length", "0"], "max_post_length must be at least 1, got 0"),
        (["--checkpoint", "best.ckpt", "--model", "GPT"], "invalid choice: 'GPT'"),
        ([], "--checkpoint"),
    ],
)
def test_mistakes_in_the_arguments_are_explained_in_one_paragraph(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save(machine(), tmp_path / "best.ckpt")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
