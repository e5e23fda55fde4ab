// `Summarize this dialogue:` before what is asked, `Summary:` after it, as templates/summarize words it.

const wrap = (message) =>
  message.role === "user"
    ? { ...message, parts: ["Summarize this dialogue:\n", ...message.parts, "\n---\nSummary:\n"] }
    : message;

function outcome({ cells: [conversation] }) {
  try {
    return { tag: "keep", val: conversation.val.map(wrap) };
  } catch (error) {
    return { tag: "fail", val: String(error) };
  }
}

export const rows = {
  configure: (settings, columns) => ["messages"],
  render: (rows) => rows.map(outcome),
};
