//! Rows to messages: what a row says by itself, then the templates.
//!
//! A row is a conversation without any template: `input` is the user's and `output` the assistant's, or a column holds the
//! turns. The data set's own template comes first; it, or the tokenizer section's where it has none, may work on columns.
//! A template that follows another gets the conversation. `new_system_prompt` takes the place of every system message: in
//! the conversation, and in what a template made of columns, which never saw it.
//!
//! What a row becomes must not depend on the rows before it: what is cached and packed would else depend on the number of
//! cores. So now and then a row is rendered once more, alone, by a template that has seen none.

use serde_json::{Map, Value};

use crate::config::plan::{ChatStyle, DatasetPlan, RowsPlan};
use crate::data::calls::Call;
use crate::data::source::SourceCell;
use crate::data::template::{Cell, MESSAGES, Message, Outcome, Role, Row, RowTemplate, SharedTemplate, Templates};
use crate::data::tokenize::BATCH_ROWS;
use crate::error::{Error, Result, quoted};
use crate::tokenizer::unmarked;

/// Makes messages of rows, in batches. One value per data worker thread. Rows of preferences are made conversations one by
/// one, and put together again.
pub struct Conversations<'p> {
    plan: &'p DatasetPlan,
    /// What the config's columns are called, in the order of a row's cells.
    names: Vec<String>,
    templates: Vec<Stage>,
}

/// Of as many rows, one is rendered twice, the last of a batch.
const PROBED_ROWS: u64 = 1024;

struct Stage {
    template: Box<dyn RowTemplate>,
    name: String,
    offered: Vec<String>,
    /// The columns it asked for.
    columns: Vec<String>,
    /// Each message becomes one part before it goes on.
    joined: bool,
}

impl Stage {
    fn open(shared: &SharedTemplate, offered: &[String], joined: bool) -> Result<Self> {
        let mut template = shared.open()?;
        let columns = template.configure(offered)?;
        if let Some(unknown) = columns.iter().find(|column| !offered.contains(column)) {
            let what = format!("the template `{}` wants a column `{unknown}`, which there is not", shared.name());
            let error = Error::config(what).cause(format!("there is `{}`", offered.join("`, `")));
            return Err(if offered == [MESSAGES] {
                error.hint("where another template or a chat data set comes before it, a template works on `messages`")
            } else {
                error.hint("`column_map` gives columns of the data the names that a template knows")
            });
        }
        Ok(Self { template, name: shared.name(), offered: offered.to_vec(), columns, joined })
    }

    fn reads_messages(&self) -> bool {
        self.columns.iter().any(|column| column == MESSAGES)
    }

    fn render(&mut self, rows: Vec<Row>) -> Result<Vec<Outcome>> {
        let needed = rows.len();
        if needed == 0 {
            return Ok(vec![]);
        }
        let probed = match &rows[..] {
            [first, .., last] if first.id % PROBED_ROWS < BATCH_ROWS as u64 => Some(last.clone()),
            _ => None,
        };
        let mut outcomes = self.template.render(rows)?;
        if outcomes.len() != needed {
            let (got, name) = (outcomes.len(), &self.name);
            return Err(Error::run(format!("the template `{name}` gave {got} results for {needed} rows")));
        }
        if let (Some(row), Some(outcome)) = (probed, outcomes.last()) {
            self.probe(row, outcome)?;
        }
        if self.joined {
            for outcome in &mut outcomes {
                let Outcome::Keep(messages) = outcome else { continue };
                for message in messages {
                    message.parts = vec![message.parts.concat()];
                }
            }
        }
        Ok(outcomes)
    }

    /// Renders a row anew, which became `outcome` after others.
    fn probe(&mut self, row: Row, outcome: &Outcome) -> Result<()> {
        let id = row.id;
        let keeps_state = |after: String, alone: String| {
            let what = format!("the template `{}` keeps something between rows", self.name);
            Error::run(what).cause(format!("after other rows {after}")).cause(format!("alone {alone}")).hint(
                "what a row becomes may depend on that row alone: rows are spread over cores, and their tokens are cached",
            )
        };
        self.template.renew()?;
        let columns = self.template.configure(&self.offered)?;
        if columns != self.columns {
            let wants = |columns: &[String]| format!("it wants the columns {}", quoted(columns));
            return Err(keeps_state(wants(&self.columns), wants(&columns)));
        }
        let again = self.template.render(vec![row])?;
        if again.first() == Some(outcome) {
            return Ok(());
        }
        let [after, alone] = [Some(outcome), again.first()].map(shown);
        let same = after.chars().zip(alone.chars()).take_while(|(a, b)| a == b).count();
        let from_there = |text: &str| text.chars().skip(same.saturating_sub(20)).take(60).collect::<String>();
        let becomes = |text: &str| format!("row {id} becomes … {} …", from_there(text));
        Err(keeps_state(becomes(&after), becomes(&alone)))
    }
}

/// What became of a row, in one line.
fn shown(outcome: Option<&Outcome>) -> String {
    unmarked(&serde_json::to_string(&outcome).unwrap_or_default())
}

impl<'p> Conversations<'p> {
    pub fn open(plan: &'p DatasetPlan, templates: &Templates) -> Result<Self> {
        let alone = [MESSAGES.to_owned()];
        let (names, joined) = match &plan.rows {
            RowsPlan::Columns { columns, template } => {
                let names: Vec<String> = columns.iter().map(|column| column.name.clone()).collect();
                (names, template.as_ref().is_some_and(|template| template.joined))
            }
            RowsPlan::Chat { template, .. } => (vec![], template.as_ref().is_some_and(|template| template.joined)),
            RowsPlan::Pairs { prompt, template: Some(_), .. } => {
                let prompt = prompt.as_ref().map(|_| "prompt");
                (prompt.into_iter().chain(["chosen", "rejected"]).map(str::to_owned).collect(), false)
            }
            RowsPlan::Pairs { .. } => (vec![], false),
            RowsPlan::Text { .. } => return Err(Error::bug("a data set of texts has no messages")),
        };
        // Alpaca's rows are no conversation before its template has made one of them.
        let is_conversation = names.iter().all(|name| name == "input" || name == "output");
        let mut offered = names.clone();
        offered.extend(is_conversation.then(|| MESSAGES.to_owned()));
        let mut stages = vec![];
        for (template, joined) in [(&templates.own, joined), (&templates.prompt, false)] {
            let Some(template) = template else { continue };
            let offered = if stages.is_empty() { &offered[..] } else { &alone[..] };
            stages.push(Stage::open(template, offered, joined)?);
        }
        Ok(Self { plan, names, templates: stages })
    }

    /// One outcome for each row of cells, in order.
    pub fn of(&mut self, first_id: u64, rows: Vec<Vec<SourceCell>>) -> Result<Vec<Outcome>> {
        let mut outcomes = vec![];
        // Conversations on their way through the templates, whose they are, and which of a pair.
        let mut waiting = vec![];
        for (index, cells) in rows.into_iter().enumerate() {
            let cells = self.first_cells(cells);
            outcomes.push(cells.as_ref().err().map(|why| Outcome::Fail(why.clone())));
            let sides = cells.into_iter().flatten().enumerate();
            waiting.extend(sides.map(|(side, cells)| (index, side, cells)));
        }
        for stage in &mut self.templates {
            let (places, rows): (Vec<(usize, usize)>, Vec<Row>) = waiting
                .drain(..)
                .map(|(index, side, cells)| ((index, side), Row { id: first_id + index as u64, cells }))
                .unzip();
            for ((index, side), outcome) in places.into_iter().zip(stage.render(rows)?) {
                let made = match outcome {
                    Outcome::Keep(messages) => vec![(side, messages)],
                    Outcome::Pair([chosen, rejected]) => vec![(0, chosen), (1, rejected)],
                    other => {
                        outcomes[index] = Some(other);
                        continue;
                    }
                };
                for (side, mut messages) in made {
                    if let (false, Some(system)) = (stage.reads_messages(), &self.plan.new_system_prompt) {
                        set_system(&mut messages, system);
                    }
                    waiting.push((index, side, vec![Cell::Messages(messages)]));
                }
            }
        }
        let mut sides: Vec<[Option<Vec<Message>>; 2]> = vec![[None, None]; outcomes.len()];
        for (index, side, mut cells) in waiting {
            if let Some(Cell::Messages(messages)) = cells.pop() {
                sides[index][side] = Some(messages);
            }
        }
        let is_paired = matches!(self.plan.rows, RowsPlan::Pairs { .. });
        let whole = |sides: [Option<Vec<Message>>; 2]| match (sides, is_paired) {
            ([Some(messages), None], false) => Outcome::Keep(messages),
            ([Some(chosen), Some(rejected)], true) => Outcome::Pair([chosen, rejected]),
            ([_, Some(_)], false) => {
                Outcome::Fail("the template makes a pair of it, and the data set is not one of preferences".to_owned())
            }
            (_, true) => Outcome::Fail("the template makes no pair of it".to_owned()),
            _ => Outcome::Fail("it has no messages".to_owned()),
        };
        Ok(outcomes.into_iter().zip(sides).map(|(outcome, sides)| outcome.unwrap_or_else(|| whole(sides))).collect())
    }

    /// A row as the first template wants it; without one, as a conversation. Two of them for a pair that no template of the data
    /// set's own makes.
    fn first_cells(&self, cells: Vec<SourceCell>) -> Result<Vec<Vec<Cell>>, String> {
        if let RowsPlan::Pairs { prompt, chosen, rejected, template: None } = &self.plan.rows {
            let conversation = |side| {
                let names = [chosen, rejected];
                let mut messages = match (prompt, &cells[..]) {
                    (Some(_), [SourceCell::Text(asked), answers @ ..]) => match answers.get(side) {
                        Some(SourceCell::Text(answer)) => asked_and_answered(asked.clone(), Some(answer.clone())),
                        _ => return Err(format!("`{}` is missing", names[side])),
                    },
                    (None, [_, _]) => match &cells[side] {
                        SourceCell::Nested(turns) => {
                            turns_of(turns, ChatStyle::OpenAi).map_err(|why| format!("`{}`: {why}", names[side]))?
                        }
                        _ => return Err(format!("`{}` is missing", names[side])),
                    },
                    _ => return Err("the row has no prompt".to_owned()),
                };
                if let Some(system) = &self.plan.new_system_prompt {
                    set_system(&mut messages, system);
                }
                check(&messages).map_err(|why| format!("`{}`: {why}", names[side]))?;
                Ok(vec![Cell::Messages(messages)])
            };
            return [0, 1].into_iter().map(conversation).collect();
        }
        let Some(stage) = self.templates.first() else {
            return Ok(vec![vec![Cell::Messages(self.conversation(&cells)?)]]);
        };
        let mut messages = if stage.reads_messages() { Some(self.conversation(&cells)?) } else { None };
        let mut cells: Vec<Option<SourceCell>> = cells.into_iter().map(Some).collect();
        let cell = |column: &String| {
            if column == MESSAGES {
                return Ok(messages.take().map_or(Cell::None, Cell::Messages));
            }
            let at = self.names.iter().position(|name| name == column);
            Ok(match at.and_then(|at| cells.get_mut(at)?.take()) {
                Some(SourceCell::Text(text)) => Cell::Text(text),
                // A list of turns is one for a template too.
                Some(SourceCell::Nested(turns)) => {
                    Cell::Messages(turns_of(&turns, ChatStyle::OpenAi).map_err(|why| format!("`{column}`: {why}"))?)
                }
                _ => Cell::None,
            })
        };
        Ok(vec![stage.columns.iter().map(cell).collect::<Result<_, String>>()?])
    }

    /// The row without a template.
    fn conversation(&self, cells: &[SourceCell]) -> Result<Vec<Message>, String> {
        let mut messages = match &self.plan.rows {
            RowsPlan::Chat { column, style, .. } => match cells {
                [SourceCell::Nested(turns)] => turns_of(turns, *style).map_err(|why| format!("`{column}`: {why}"))?,
                _ => return Err(format!("`{column}` is missing")),
            },
            _ => {
                let text = |name: &str| {
                    let at = self.names.iter().position(|known| known == name)?;
                    match cells.get(at)? {
                        SourceCell::Text(text) => Some(text.clone()),
                        _ => None,
                    }
                };
                asked_and_answered(text("input").ok_or("the row has no `input`")?, text("output"))
            }
        };
        if let Some(system) = &self.plan.new_system_prompt {
            set_system(&mut messages, system);
        }
        if matches!(self.plan.rows, RowsPlan::Chat { .. }) {
            check(&messages)?;
        }
        Ok(messages)
    }
}

/// What a prompt is to a template: no answer yet.
pub fn prompt(template: Option<&SharedTemplate>, system: Option<&str>, user: &str) -> Result<Vec<Message>> {
    let mut messages = asked_and_answered(user.to_owned(), None);
    if let Some(system) = system {
        set_system(&mut messages, system);
    }
    let Some(template) = template else { return Ok(messages) };
    let offered = ["input", "output", MESSAGES].map(str::to_owned);
    let mut stage = Stage::open(template, &offered, false)?;
    // Its place is there, for templates that begin an answer.
    messages.push(Message::of(Role::Assistant, ""));
    let cell = |column: &String| match column.as_str() {
        "input" => Cell::Text(user.to_owned()),
        MESSAGES => Cell::Messages(messages.clone()),
        _ => Cell::None,
    };
    let row = Row { id: 0, cells: stage.columns.iter().map(cell).collect() };
    let rendered = match stage.render(vec![row])?.pop() {
        Some(Outcome::Keep(messages)) => messages,
        Some(Outcome::Pair(_)) => return Err(Error::config("the template makes pairs, and no prompt of a text")),
        Some(Outcome::Skip(why) | Outcome::Fail(why)) => {
            return Err(Error::config("the template makes no prompt of this text").cause(why));
        }
        None => return Err(Error::run("the template returned nothing for the prompt")),
    };
    let mut messages = rendered;
    if let (false, Some(system)) = (stage.reads_messages(), system) {
        set_system(&mut messages, system);
    }
    Ok(messages)
}

fn asked_and_answered(input: String, output: Option<String>) -> Vec<Message> {
    let answer = output.map(|output| Message::of(Role::Assistant, output));
    std::iter::once(Message::of(Role::User, input)).chain(answer).collect()
}

/// Puts a system message first, in place of any other.
fn set_system(messages: &mut Vec<Message>, system: &str) {
    messages.retain(|message| message.role != Role::System);
    messages.insert(0, Message::of(Role::System, system));
}

/// The turns of a list, in either form that data sets have them.
pub fn turns_of(turns: &Value, style: ChatStyle) -> Result<Vec<Message>, String> {
    let Value::Array(turns) = turns else { return Err(format!("a list of turns is needed, found {}", kind(turns))) };
    let turn = |(index, turn): (usize, &Value)| {
        let Value::Object(turn) = turn else { return Err(format!("turn {index} is {}", kind(turn))) };
        let message = match style {
            ChatStyle::ShareGpt => sharegpt(turn),
            ChatStyle::OpenAi => openai(turn),
        };
        message.map_err(|why| format!("turn {index} {why}"))
    };
    turns.iter().enumerate().map(turn).collect()
}

/// `{"from": "human", "value": "…"}`; a `function_call` has the JSON of one call or of a list of them.
fn sharegpt(turn: &Map<String, Value>) -> Result<Message, String> {
    let role = match text(turn, "from")? {
        "system" => Role::System,
        "human" | "user" => Role::User,
        "gpt" | "assistant" => Role::Assistant,
        "tool" | "observation" => Role::Tool,
        "function_call" => {
            let value = turn.get("value").unwrap_or(&Value::Null);
            let parsed: Value;
            let value = match value {
                Value::String(text) => {
                    parsed =
                        serde_json::from_str(text).map_err(|error| format!("makes a call that is no JSON: {error}"))?;
                    &parsed
                }
                value => value,
            };
            let calls = if let Value::Array(calls) = value { calls } else { std::slice::from_ref(value) };
            return calling(vec![], calls);
        }
        other => {
            let known = "system, human, gpt, tool, function_call and observation";
            return Err(format!("is from `{other}`; known are {known}"));
        }
    };
    Ok(Message::of(role, text(turn, "value")?))
}

/// `{"role": "user", "content": "…"}`; the content may be a list of parts, each a text. The assistant's may have `tool_calls`,
/// and no content then. Which call a tool answers is told by its place; `tool_call_id` is not asked.
fn openai(turn: &Map<String, Value>) -> Result<Message, String> {
    let role = match text(turn, "role")? {
        "ipython" => Role::Tool,
        name => Role::ALL
            .into_iter()
            .find(|role| role.name() == name)
            .ok_or_else(|| format!("has the role `{name}`; known are system, user, assistant and tool"))?,
    };
    let calls = match turn.get("tool_calls") {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(format!("has {} for its `tool_calls`, where a list is needed", kind(other))),
    };
    if role != Role::Assistant && !calls.is_empty() {
        return Err(format!("has `tool_calls`, and is the {}'s; the assistant calls tools", role.name()));
    }
    let part = |part: &Value| {
        let part = part.as_object().ok_or("has a part that is no object")?;
        match part.get("type").and_then(Value::as_str) {
            Some("text") => text(part, "text").or_else(|_| text(part, "content")).map(str::to_owned),
            other => Err(format!("has a part of type `{}`; texts are read", other.unwrap_or("none"))),
        }
    };
    let parts = match turn.get("content") {
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Result<_, _>>()?,
        None | Some(Value::Null) if !calls.is_empty() => vec![],
        _ => vec![text(turn, "content")?.to_owned()],
    };
    if calls.is_empty() { Ok(Message { parts, ..Message::of(role, "") }) } else { calling(parts, calls) }
}

/// The assistant's message that calls tools.
fn calling(parts: Vec<String>, calls: &[Value]) -> Result<Message, String> {
    if calls.is_empty() {
        return Err("makes no call".to_owned());
    }
    let call = |(index, call): (usize, &Value)| match Call::of(call) {
        Ok(call) => Ok(call.json("arguments")),
        Err(why) => Err(format!("makes a call (number {index}) that {why}")),
    };
    let calls = calls.iter().enumerate().map(call).collect::<Result<_, _>>()?;
    Ok(Message { role: Role::Assistant, parts, calls, train: None })
}

fn text<'v>(turn: &'v Map<String, Value>, key: &str) -> Result<&'v str, String> {
    match turn.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("has {} for its `{key}`, where a text is needed", kind(other))),
        None => {
            Err(format!("has no `{key}`; its keys are `{}`", turn.keys().cloned().collect::<Vec<_>>().join("`, `")))
        }
    }
}

fn kind(value: &Value) -> &'static str {
    super::source::json_kind(value)
}

/// torchtune's rules of a conversation, but that a tool's answer may follow any of the assistant's messages. Calls are answered
/// next, by no more messages than there are calls, or nothing follows them.
fn check(messages: &[Message]) -> Result<(), String> {
    if messages.len() < 2 {
        return Err(format!("a conversation has two messages at least, and this one {}", messages.len()));
    }
    // An assistant's stands for nothing before the first.
    let mut before = None;
    for (index, message) in messages.iter().enumerate() {
        let wrong = match (message.role, before) {
            (Role::System, Some(_)) => "is the system's, which comes first",
            (Role::User, Some(Role::User)) => "is the user's, as the one before it",
            (Role::Assistant, None | Some(Role::System | Role::Assistant)) => {
                "is the assistant's, and answers no user's or tool's"
            }
            (Role::Tool, None | Some(Role::System | Role::User)) => "is a tool's, and follows none of the assistant's",
            _ => {
                before = Some(message.role);
                let (calls, rest) = (message.calls.len(), &messages[index + 1..]);
                let answers = rest.iter().take_while(|message| message.role == Role::Tool).count();
                if calls > 0 && answers > calls {
                    return Err(format!("message {} is a tool's, and answers no call", index + 1 + calls));
                }
                if calls > 0 && answers == 0 && !rest.is_empty() {
                    return Err(format!("message {index} calls tools, and no tool's message follows"));
                }
                continue;
            }
        };
        return Err(format!("message {index} {wrong}"));
    }
    Ok(())
}
