"""Two checklists for who writes the paper: which items this page answers, and which only a person can.

CLAIM 2024: Tejani and others, Radiology: Artificial Intelligence 2024; 6(4): e240300. TRIPOD+AI: Collins and others,
BMJ 2024; 385: e078378. The numbers are theirs; the words are ours and shorter, so read theirs before you sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.report.evidence import Evidence
from pipeline.report.page.html import Markup, folded, table, tag


@dataclass(frozen=True)
class Item:
    """An item of a checklist.

    Attributes:
        number: As the checklist has it.
        asks: What it wants to know, in our words.
        here: Sections of this page that answer it, by id; empty where only a person can.
        person: What is left to a person; empty where nothing is.
    """

    number: str
    asks: str
    here: tuple[str, ...] = ()
    person: str = ""


CLAIM = (
    Item("1", "Title or abstract says that it is a study of AI, and of which kind", (), "the title"),
    Item("2", "A summary of design, methods, results and conclusions", ("summary",), "the abstract"),
    Item("3", "Background, and what the method is to be used for", (), "all of it"),
    Item("4", "Aims and hypotheses", ("summary",), "hypotheses that were fixed before"),
    Item("5", "Whether data were collected before or after the study was planned", (), "all of it"),
    Item("6", "The goal of the study", (), "all of it"),
    Item("7", "Where the data come from", ("sources",), "hospitals, period, consent"),
    Item("8", "Who was included and excluded, and why", ("cohort",), "the rules by which patients were chosen"),
    Item("9", "What was done to the images first", ("settings",), "what was done before the files were made"),
    Item("10", "Whether a part of the data was selected", ("cohort",), "selection before the files were made"),
    Item("11", "How patients were made unrecognisable", (), "all of it"),
    Item("12", "What was done about missing data", ("cohort",), "what is missing outside of the images"),
    Item("13", "How the images were acquired", (), "all of it"),
    Item("14", "How the true class was found", (), "all of it"),
    Item("15", "Why it was found that way", (), "all of it"),
    Item("16", "Who annotated", (), "all of it"),
    Item("17", "How the test set was annotated", (), "all of it"),
    Item("18", "How far annotators agree, with others and with themselves", (), "all of it"),
    Item("19", "How data were assigned to splits", ("cohort", "settings"), "why so, if the splits were given"),
    Item("20", "At which level splits are disjoint", ("cohort",)),
    Item("21", "The intended size of the test set", (), "all of it; the size reached is on this page"),
    Item("22", "The model in detail", ("model", "encoder", "settings")),
    Item("23", "Software and its versions", ("costs",)),
    Item("24", "First weights of the model", ("model",)),
    Item("25", "How it was trained", ("model", "settings"), "settings that were tried and dropped"),
    Item("26", "How the final model was chosen", ("limits", "curves"), "how many others were tried"),
    Item("27", "Whether models were put together", ("model",)),
    Item("28", "Which scores, and why these", ("results", "acting"), "why these"),
    Item("29", "How uncertainty is measured", ("results",)),
    Item("30", "How robust the result is", ("subgroups", "study"), "other scanners, noise, settings"),
    Item("31", "How decisions are explained, and whether that was checked", ("looks",), "whether a reader is helped"),
    Item("32", "How it was evaluated on data of the same source", ("results",)),
    Item("33", "How it was tested on data from elsewhere", ("elsewhere",), "where those data come from"),
    Item("34", "Registration of a trial", (), "all of it"),
    Item("35", "Numbers included and excluded", ("cohort",), "before the files were made"),
    Item("36", "Who the patients of each split are", ("cohort", "subgroups"), "age, sex and illness by split"),
    Item("37", "Results with uncertainty on every split that counts", ("results", "curves")),
    Item("38", "Diagnostic accuracy and its precision", ("acting", "results")),
    Item("39", "What goes wrong and why", ("curves", "looks"), "a reading of the errors"),
    Item("40", "Limits of the study", ("limits",), "those that only you know"),
    Item("41", "What it means for practice", (), "all of it"),
    Item("42", "Where the protocol is", (), "all of it"),
    Item("43", "Where software, model and data are", ("again", "sources"), "where they can be had"),
    Item("44", "Who paid, and what part they had", (), "all of it"),
)

TRIPOD = (
    Item("1", "Title: a prediction model, for whom and of what", (), "the title"),
    Item("2", "Abstract, by the list for abstracts", ("summary",), "the abstract"),
    Item("3a", "Medical context, and models that exist", (), "all of it"),
    Item("3b", "For whom it is meant, where in care, used by whom", (), "all of it"),
    Item("3c", "Known inequalities in health", (), "all of it"),
    Item("4", "Aims: development, evaluation or both", ("summary",), "hypotheses that were fixed before"),
    Item("5a", "Where the data come from, and whom they stand for", ("sources",), "whom they stand for"),
    Item("5b", "From when to when", (), "all of it"),
    Item("6a", "Setting and number of centres", (), "all of it"),
    Item("6b", "Who was eligible", (), "all of it"),
    Item("6c", "Treatments", (), "all of it"),
    Item("7", "Preparation of the data, and whether it was alike for all", ("settings",), "before the files were made"),
    Item("8a", "The outcome, and how and when it was assessed", (), "all of it"),
    Item("8b", "Who assessed it, where that takes judgement", (), "all of it"),
    Item("8c", "Whether assessors were blind", (), "all of it"),
    Item("9a", "How predictors were chosen", ("encoder",), "why these images"),
    Item("9b", "What the predictors are and how they were measured", ("settings",), "how images were acquired"),
    Item("9c", "Who judged predictors, where that takes judgement", (), "all of it"),
    Item("10", "Why so many participants", (), "all of it; how many there are is on this page"),
    Item("11", "What was done about missing data", ("cohort",), "what is missing outside of the images"),
    Item("12a", "Which data served what", ("cohort",)),
    Item("12b", "How predictors went into the model", ("settings",)),
    Item(
        "12c",
        "The model, how it was built and tuned",
        ("model", "settings", "curves"),
        "what else was tried",
    ),
    Item("12d", "Differences between centres or clusters", ("subgroups",), "all of it without such a column"),
    Item("12e", "Which measures of performance, and why", ("results", "acting"), "why these"),
    Item("12f", "Whether the model was updated afterwards", (), "all of it"),
    Item("12g", "How predictions are calculated", ("again",)),
    Item("13", "What was done about rare classes", ("settings",)),
    Item("14", "What was done for fairness", ("subgroups",), "what was done, and why"),
    Item("15", "What the model gives, and how thresholds were chosen", ("acting",), "why these thresholds"),
    Item(
        "16",
        "How development and evaluation data differ",
        ("cohort", "elsewhere"),
        "differences that are not in the files",
    ),
    Item("17", "Ethics and consent", (), "all of it"),
    Item("18a", "Who paid", (), "all of it"),
    Item("18b", "Conflicts of interest", (), "all of it"),
    Item("18c", "Where the protocol is", (), "all of it"),
    Item("18d", "Registration", (), "all of it"),
    Item("18e", "Whether the data can be had", ("sources",), "how"),
    Item("18f", "Whether the code can be had", ("again",), "where"),
    Item("19", "Whether patients and public took part", (), "all of it"),
    Item("20a", "The flow of participants, with and without the outcome", ("cohort",), "before the files were made"),
    Item("20b", "Who the participants are", ("subgroups",), "age, sex and illness"),
    Item("20c", "Evaluation beside development data", ("cohort",), "more than the classes"),
    Item("21", "Participants and outcomes in each analysis", ("cohort", "results", "subgroups")),
    Item("22", "The whole model, for others to use", ("again",), "hand on what `pipeline export` writes"),
    Item("23a", "Performance with intervals, in subgroups too", ("results", "subgroups", "curves")),
    Item("23b", "Performance by centre or cluster", ("subgroups",), "all of it without such a column"),
    Item("24", "What an update of the model gave", (), "all of it, if there was one"),
    Item("25", "What it means, for fairness too", (), "all of it"),
    Item("26", "Limits of the study", ("limits",), "those that only you know"),
    Item("27a", "What happens with poor or missing input", ("cohort",), "poor images that can be read"),
    Item("27b", "What users must do and know", (), "all of it"),
    Item("27c", "What comes next", (), "all of it"),
)
_ALWAYS_THERE = frozenset(
    ("summary", "cohort", "results", "acting", "curves", "limits", "encoder", "model", "costs", "sources", "settings")
)
_WORDS = {
    "summary": "Summary", "cohort": "Patients and images", "results": "Results", "acting": "Acting on it",
    "subgroups": "By subgroup", "elsewhere": "On data from elsewhere", "curves": "Curves", "looks": "Where it looks",
    "study": "Beside other runs", "limits": "What this result does not show", "encoder": "Encoder and store",
    "model": "Model and training", "costs": "What it took", "again": "How to do it again", "sources": "Sources",
    "settings": "All settings",
}  # fmt: skip


def checklists(evidence: Evidence) -> Iterator[Markup]:
    """Both lists, folded, each item with where it is answered."""
    there = present(evidence)
    yield tag("h2", "Checklists", id="checklists")
    yield tag(
        "p",
        "Which items of two reporting guidelines this page answers, and what is left to a person. The numbers are the "
        "guidelines'; the words are ours and shorter, and no list replaces the guideline.",
    )
    named = (
        ("CLAIM 2024, for AI in medical imaging", CLAIM, "Tejani and others, Radiology: AI 2024; 6(4): e240300"),
        ("TRIPOD+AI, for prediction models", TRIPOD, "Collins and others, BMJ 2024; 385: e078378"),
    )
    for title, items, source in named:
        answered = [item for item in items if _places(item, there)]
        whole = sum(not item.person for item in answered)
        said = f"{title}: {whole} of {len(items)} items answered here, {len(answered) - whole} in part"
        rows = [[item.number, item.asks, _links(item, there), _left(item, there)] for item in items]
        head = ["item", "asks for", "on this page", "left to a person"]
        yield folded(said, table(head, rows, caption=f"{source}; in our words", numeric=False))


def present(evidence: Evidence) -> set[str]:
    """Ids of the sections that say something about this run."""
    there = set(_ALWAYS_THERE)
    there |= {"subgroups"} if evidence.figures["subgroups"] else set()
    there |= {"looks"} if evidence.pictures is not None else set()
    there |= {"elsewhere"} if evidence.elsewhere else set()
    there |= {"study"} if evidence.study is not None else set()
    there |= {"again"} if evidence.commands.lines else set()
    return there


def _places(item: Item, there: set[str]) -> Sequence[str]:
    return [place for place in item.here if place in there]


def _links(item: Item, there: set[str]) -> Markup:
    places = _places(item, there)
    links = [tag("a", _WORDS[place], href=f"#{place}") for place in places]
    return Markup(", ".join(links)) if links else Markup("\N{EN DASH}")


def _left(item: Item, there: set[str]) -> str:
    if not _places(item, there):
        return item.person if item.person.startswith("all of it") or not item.here else "all of it"
    return "whether these are the columns that matter" if "without such" in item.person else item.person or "nothing"
