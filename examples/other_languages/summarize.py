# `Summarize this dialogue:` before what is asked, `Summary:` after it, as templates/summarize words it.

from wit_world import exports
from wit_world.exports.rows import Message, Outcome_Fail, Outcome_Keep, Role


def wrap(message):
    if message.role != Role.USER:
        return message
    return Message(message.role, ["Summarize this dialogue:\n", *message.parts, "\n---\nSummary:\n"], message.calls, message.train)


def outcome(row):
    try:
        return Outcome_Keep([wrap(message) for message in row.cells[0].value])
    except Exception as error:
        return Outcome_Fail(f"{type(error).__name__}: {error}")


class Rows(exports.Rows):
    def configure(self, settings, columns):
        return ["messages"]

    def render(self, rows):
        return [outcome(row) for row in rows]
