"""The one error that a person reads: where, what was expected, what was found, what to do."""

from __future__ import annotations


class BadInput(ValueError):
    """Input or usage that cannot be accepted; the command line prints it and exits with 2.

    Parameters are full phrases without a trailing stop: `where` names the file, key or option,
    `expected` and `found` say what differs, `remedy` says what the reader can do about it.
    """

    def __init__(self, where: object, *, expected: str, found: str, remedy: str) -> None:
        self.where = str(where)
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self.where, expected, found, remedy)

    def __str__(self) -> str:
        return (
            f"{self.where}\n  expected: {self.expected}\n"
            f"  found:    {self.found}\n  remedy:   {self.remedy}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only fields: the default pickling of exceptions would call __init__ wrongly,
        # and these errors travel back from Dask workers.
        return (_rebuild, (type(self), self.where, self.expected, self.found, self.remedy))


class BadSetting(BadInput):
    """A setting or a folder of this machine is at fault, and no sample: it is never put aside."""


def _rebuild(kind: type[BadInput], where: str, expected: str, found: str, remedy: str) -> BadInput:
    return kind(where, expected=expected, found=found, remedy=remedy)


class BadInputs(ValueError):
    """Several faults found in one pass (a config file names all of its faults at once)."""

    def __init__(self, faults: list[BadInput]) -> None:
        self.faults = faults
        super().__init__(faults)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def not_there_yet(where: object, what: str, instead: str) -> BadInput:
    """The refusal of an option that the interface names and this version does not have."""
    return BadInput(
        where,
        expected="an option that this version has",
        found=f"{what}, which is not there yet",
        remedy=instead,
    )
