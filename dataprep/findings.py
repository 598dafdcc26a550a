"""What can be wrong with a data set, and the list of what was found.

Findings are problems, which training refuses or which mean that the copy is not whole, and notes, which training has a
treatment for. A few examples of each finding are kept.
"""

from collections.abc import Callable, Iterator

PROBLEM, NOTE = "problem", "note"
EXAMPLES = 5

IMAGE_KINDS = {
    "files that cannot be read": (PROBLEM, "restore them: the loader stops at the first one"),
    "empty files": (PROBLEM, "fetch them again; an empty file is a download that never began"),
    "files that are no image": (PROBLEM, "fetch them again, and look into one: often it is a server's error page"),
    "truncated images": (PROBLEM, "fetch them again; they end in the middle"),
    "damaged images": (PROBLEM, "fetch them again; they do not decode"),
    "images of another size than the annotation file says": (
        PROBLEM, "their boxes are wrong: correct the file or its entry (sides exchanged: its width and height)"),
    "images that decode with a warning": (NOTE, "fetch them again if their pixels matter: part may be grey or shifted"),
    "images with an EXIF orientation": (NOTE, "listed in the size that is stored: trained as stored, not turned"),
    "images that EXIF turns": (NOTE, "listed in the size of the upright picture: training turns them upright"),
    "images of which the size does not tell whether EXIF turns them": (
        NOTE, "half turns, mirror images, squares: trained as stored; look at their boxes, --exif apply turns them"),
    "images with an invalid EXIF orientation": (NOTE, "not one of 1 to 8: nobody applies it"),
    "greyscale images": (NOTE, "decoded to RGB"),
    "CMYK images": (NOTE, "decoded to RGB; the colours of some are inverted"),
    "palette or transparent images": (NOTE, "decoded to RGB; transparency is ignored"),
    "files of another format than their name says": (NOTE, "read by their content; slower than JPEG"),
}  # fmt: skip


class Findings:
    """What was found: dicts with level, split, what, count, examples, do.

    on_each(split, what, file name, detail) is called for every single one.
    """

    def __init__(self, on_each: Callable[[str, str, str, str], None] = lambda split, what, name, detail: None) -> None:
        self.items: list[dict] = []
        self.on_each = on_each

    def add(self, level: str, split: str, what: str, count: int, examples: list[str], do: str) -> None:
        if not count:
            return
        shown = examples[:EXAMPLES]
        for item in self.items:
            if (item["split"], item["what"]) == (split, what):
                item["count"] += count
                item["examples"] = (item["examples"] + shown)[:EXAMPLES]
                return
        keys = ("level", "split", "what", "count", "examples", "do")
        self.items.append(dict(zip(keys, (level, split, what, count, shown, do), strict=True)))

    def add_names(self, level: str, split: str, what: str, names: Iterator[str], do: str) -> None:
        """One finding for each name."""
        for name in names:
            self.on_each(split, what, name, "")
            self.add(level, split, what, 1, [name], do)

    @property
    def problems(self) -> int:
        return sum(item["level"] == PROBLEM for item in self.items)
