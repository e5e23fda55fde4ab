//! Messages to token ids: the rules that decide every number of a run.
//!
//! Each part of a message is encoded on its own; joined first, other tokens come out at the seams. Assistant messages carry
//! loss, user and tool messages too under `train_on_input`, system messages never; a message's own `train` wins. What a
//! format writes around a message (header, end of turn) carries loss when the message does. Each format of
//! [`Format`] is torchtune's of that name, token for token, but for what its users reported as wrong: EOS of the Qwen
//! formats is trained also where `max_seq_len` is set.
//!
//! torchtune knows no calls apart from a message's text; here each format writes them as the model's own chat template does,
//! and so the answers of tools to them. Text and calls are then encoded as one, since models know them from one rendered
//! text. A message's text without calls, before a tool's answer, is a call as torchtune has it.
//!
//! Too long a sample keeps its first `max_seq_len` tokens, the last of them replaced by EOS, which carries loss only where
//! the token it replaces did (never under Llama 3, whose EOS has none). That teaches an answer to end where it was cut,
//! which a reader may question; it is what torchtune does, and the recorded losses have it.

use std::collections::VecDeque;

use crate::config::plan::Truncation;
use crate::data::calls::Call;
use crate::data::template::{Message, Role};
use crate::error::{Error, Result};
use crate::tokenizer::{ChatMessage, ChatTemplate, Format, Tokenizer, ToolCall, is_blank};

#[derive(Clone, Copy, Debug)]
pub struct Encoder<'t> {
    pub tokenizer: &'t Tokenizer,
    pub max_seq_len: Option<usize>,
    pub train_on_input: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub tokens: Vec<u32>,
    /// Which tokens carry loss.
    pub trained: Vec<bool>,
    pub was_cut: bool,
}

impl Encoder<'_> {
    /// A training sample of a text without messages, after BOS. It is cut one token short of the limit and gets no EOS then;
    /// every token is learned. So does torchtune.
    pub fn text(&self, text: &str, add_eos: bool) -> Result<Encoded, String> {
        let mut tokens = encode_text(self.tokenizer, text).map_err(|error| one_line(&error))?;
        tokens.extend(add_eos.then(|| self.tokenizer.eos()));
        let was_cut = self.max_seq_len.is_some_and(|limit| tokens.len() >= limit);
        if let Some(limit) = self.max_seq_len {
            tokens.truncate(limit - 1);
        }
        Ok(Encoded { trained: vec![true; tokens.len()], tokens, was_cut })
    }

    /// A training sample, or why the row is bad.
    pub fn sample(&self, messages: &[Message]) -> Result<Encoded, String> {
        let tokenizer = self.tokenizer;
        let limit = self.max_seq_len.unwrap_or(usize::MAX);
        let turns = turns(tokenizer, messages, |message| self.is_trained(message))?;
        let Some(last) = turns.last() else {
            return Err("the template made no message of it".to_owned());
        };
        // What lies beyond the cut need not be encoded.
        let enough = if tokenizer.truncation() == Truncation::Right { limit } else { usize::MAX };
        let mut writer = Writer { tokenizer, enough, encoded: Encoded::default() };
        match tokenizer.format() {
            Format::ChatTemplate(template) => writer.rendered(template, &turns)?,
            _ => writer.conversation(&turns)?,
        }
        match tokenizer.format() {
            Format::Plain | Format::ChatMl { .. } => writer.token(tokenizer.eos(), last.is_trained),
            Format::Llama3 { .. } => writer.token(tokenizer.eos(), false),
            Format::Turns { .. } | Format::ChatTemplate(_) => {}
        }
        let mut encoded = writer.encoded;
        if encoded.tokens.len() > limit {
            self.cut(&mut encoded, limit);
        }
        Ok(encoded)
    }

    fn cut(&self, encoded: &mut Encoded, limit: usize) {
        let Encoded { tokens, trained, was_cut } = encoded;
        *was_cut = true;
        if self.tokenizer.truncation() == Truncation::Left {
            tokens.drain(..tokens.len() - limit);
            trained.drain(..trained.len() - limit);
            return;
        }
        tokens.truncate(limit);
        trained.truncate(limit);
        if let (Some(token), Some(trained)) = (tokens.last_mut(), trained.last_mut()) {
            *token = self.tokenizer.eos();
            *trained &= !matches!(self.tokenizer.format(), Format::Llama3 { .. });
        }
    }

    fn is_trained(&self, message: &Message) -> bool {
        message.train.unwrap_or(match message.role {
            Role::System => false,
            Role::User | Role::Tool => self.train_on_input,
            Role::Assistant => true,
        })
    }
}

/// What a model is given to continue: the tokens of a sample up to its last answer, the answer's header included. An answer
/// that a template has begun is part of it.
pub fn encode_prompt(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    let failed = |why: String| Error::config("the prompt does not fit the tokenizer's message format").cause(why);
    let (asked, begun) = match messages {
        [.., answer] if !answer.calls.is_empty() => return Err(failed("its answer calls tools already".to_owned())),
        [asked @ .., answer] if answer.role == Role::Assistant => (asked, &answer.parts[..]),
        all => (all, &[][..]),
    };
    let mut turns = turns(tokenizer, asked, |_| false).map_err(failed)?;
    let texts = tokenizer.turn_texts().iter().find(|(role, _)| *role == Role::Assistant);
    let before_answer = texts.map(|(_, [before, _])| before.as_str()).into_iter();
    let begun: Vec<&str> =
        before_answer.chain(begun.iter().map(String::as_str)).filter(|part| !part.is_empty()).collect();
    if let Format::ChatTemplate(template) = tokenizer.format() {
        let text = template.render(&chat(&turns), true).map_err(failed)?;
        return tokenizer.encode(&(text + &begun.concat()));
    }
    turns.push(Turn { parts: begun, is_open: true, ..Turn::of(Role::Assistant) });
    let mut writer = Writer { tokenizer, enough: usize::MAX, encoded: Encoded::default() };
    writer.conversation(&turns).map_err(failed)?;
    Ok(writer.encoded.tokens)
}

/// A bare text to continue, after BOS: no message, no header.
pub fn encode_text(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = tokenizer.text_bos().into_iter().collect();
    tokens.extend(tokenizer.encode(text)?);
    Ok(tokens)
}

/// A message with the texts that the tokenizer section puts around it.
struct Turn<'m> {
    role: Role,
    parts: Vec<&'m str>,
    calls: Vec<Call>,
    is_trained: bool,
    /// The assistant's text is a call: a tool's answer follows, and it has no calls of its own.
    calls_tool: bool,
    /// A tool answers one of `calls`.
    answers_call: bool,
    /// The answer is still to be written: nothing ends it.
    is_open: bool,
}

impl Turn<'_> {
    fn of(role: Role) -> Self {
        Turn {
            role,
            parts: vec![],
            calls: vec![],
            is_trained: false,
            calls_tool: false,
            answers_call: false,
            is_open: false,
        }
    }
}

fn turns<'m>(
    tokenizer: &'m Tokenizer,
    messages: &'m [Message],
    is_trained: impl Fn(&Message) -> bool,
) -> Result<Vec<Turn<'m>>, String> {
    let texts = tokenizer.turn_texts();
    let mut calls_before = false;
    let turn = |(index, message): (usize, &'m Message)| {
        let mut parts: Vec<&str> = message.parts.iter().map(String::as_str).collect();
        let role = message.role;
        if let Some((_, [before, after])) = texts.iter().find(|(of, _)| *of == role) {
            parts.insert(0, before);
            parts.push(after);
            parts.retain(|part| !part.is_empty());
        }
        if role != Role::Assistant && !message.calls.is_empty() {
            return Err(format!("message {index} calls tools, and is the {}'s; the assistant's may", role.name()));
        }
        let call = |text: &String| match Call::parse(text) {
            Ok(mut call) => {
                call.mark(tokenizer.special_tokens());
                Ok(call)
            }
            Err(why) => Err(format!("message {index} makes a call that {why}")),
        };
        let calls: Vec<Call> = message.calls.iter().map(call).collect::<Result<_, _>>()?;
        if role != Role::Tool {
            calls_before = !calls.is_empty();
        }
        let is_answered = messages.get(index + 1).is_some_and(|next| next.role == Role::Tool);
        let calls_tool = role == Role::Assistant && is_answered && calls.is_empty();
        let answers_call = role == Role::Tool && calls_before;
        Ok(Turn { parts, calls, is_trained: is_trained(message), calls_tool, answers_call, ..Turn::of(role) })
    };
    messages.iter().enumerate().map(turn).collect()
}

/// The messages as a chat template wants them. Calls are numbered: templates that ask for an id want one of nine letters
/// (Mistral's), and tools answer in the order of the calls.
fn chat(turns: &[Turn]) -> Vec<ChatMessage> {
    let (mut num_calls, mut unanswered) = (0, VecDeque::new());
    let message = |turn: &Turn| {
        let call = |call: &Call| {
            num_calls += 1;
            ToolCall { id: format!("call{num_calls:05}"), r#type: "function", function: call.clone() }
        };
        let tool_calls: Vec<ToolCall> = turn.calls.iter().map(call).collect();
        if turn.role != Role::Tool {
            unanswered = tool_calls.iter().map(|call| (call.id.clone(), call.function.name.clone())).collect();
        }
        let answered = if turn.role == Role::Tool { unanswered.pop_front() } else { None };
        let (tool_call_id, name) = answered.unzip();
        let text = turn.parts.concat();
        let content = if text.is_empty() && !tool_calls.is_empty() { None } else { Some(text) };
        ChatMessage { role: turn.role.name(), content, tool_calls, tool_call_id, name }
    };
    turns.iter().map(message).collect()
}

struct Writer<'t> {
    tokenizer: &'t Tokenizer,
    /// Once there are more tokens than this, texts are left out.
    enough: usize,
    encoded: Encoded,
}

impl Writer<'_> {
    fn token(&mut self, token: u32, trained: bool) {
        self.encoded.tokens.push(token);
        self.encoded.trained.push(trained);
    }

    fn text(&mut self, text: &str, trained: bool) -> Result<(), String> {
        self.text_after(text, 0, trained)
    }

    /// Encodes a text and drops its first `skip` tokens.
    fn text_after(&mut self, text: &str, skip: usize, trained: bool) -> Result<(), String> {
        if self.encoded.tokens.len() <= self.enough {
            let tokens = self.tokenizer.encode(text).map_err(|error| one_line(&error))?;
            self.encoded.tokens.extend(tokens.into_iter().skip(skip));
            self.encoded.trained.resize(self.encoded.tokens.len(), trained);
        }
        Ok(())
    }

    fn conversation(&mut self, turns: &[Turn]) -> Result<(), String> {
        let cannot = |tokenizer: &str| {
            let index = turns.iter().position(|turn| !turn.calls.is_empty());
            let own = "`HuggingFaceModelTokenizer` takes the model's own chat template, where it has one";
            let why = |index| format!("message {index} calls tools, and {tokenizer} has no way to write that; {own}");
            index.map_or(Ok(()), |index| Err(why(index)))
        };
        match *self.tokenizer.format() {
            Format::Plain => {
                cannot("the format of `hf_tokenizer`")?;
                if let Some(bos) = self.tokenizer.bos() {
                    self.token(bos, turns.first().is_some_and(|turn| turn.is_trained));
                }
                for turn in turns {
                    for part in &turn.parts {
                        self.text(part.trim_end_matches(' '), turn.is_trained)?;
                    }
                }
                Ok(())
            }
            Format::Llama3 { .. } => {
                if let Some(bos) = self.tokenizer.bos() {
                    self.token(bos, false);
                }
                turns.iter().try_for_each(|turn| self.llama3(turn))
            }
            Format::Turns { line_break } => {
                cannot("the format of Llama 2 and Mistral")?;
                self.turns(turns, line_break)
            }
            Format::ChatMl { tool_call, .. } => {
                if tool_call.is_none() {
                    cannot("the format of Qwen 2")?;
                }
                (0..turns.len()).try_for_each(|index| self.chat_ml(turns, index))
            }
            // Its text is one, so that `rendered` writes it.
            Format::ChatTemplate(_) => Ok(()),
        }
    }

    fn llama3(&mut self, turn: &Turn) -> Result<(), String> {
        let Format::Llama3 { start_header, end_header, eot, eom, python_tag } = *self.tokenizer.format() else {
            return Ok(());
        };
        let trained = turn.is_trained;
        let missing = |name: &str| format!("it has a tool's message, and the tokenizer has no `{name}`");
        self.token(start_header, trained);
        self.text(if turn.role == Role::Tool { "ipython" } else { turn.role.name() }, trained)?;
        self.token(end_header, trained);
        self.text("\n\n", trained)?;
        if turn.calls_tool {
            self.token(python_tag.ok_or_else(|| missing("<|python_tag|>"))?, trained);
        }
        for part in &turn.parts {
            self.text(part.trim_matches(is_blank), trained)?;
        }
        match &turn.calls[..] {
            [] => {}
            // Llama 3.1's and 3.2's chat templates write a call as the whole message, and servers read it as one. The tag
            // and `<|eom_id|>` are there for code and for built-in tools: a call of one's own ends as any message does,
            // and so does what a tool answers to it.
            [call] if turn.parts.iter().all(|part| part.trim_matches(is_blank).is_empty()) => {
                self.text(&call.json("parameters"), trained)?;
            }
            [_] => return Err("its format writes a call as the whole message, and one has text beside it".to_owned()),
            _ => return Err("its format writes one call in a message, and one has more".to_owned()),
        }
        if turn.is_open {
            return Ok(());
        }
        let goes_on = turn.calls_tool || (turn.role == Role::Tool && !turn.answers_call);
        self.token(if goes_on { eom.ok_or_else(|| missing("<|eom_id|>"))? } else { eot }, trained);
        Ok(())
    }

    fn turns(&mut self, turns: &[Turn], line_break: usize) -> Result<(), String> {
        let (mut starts, mut after_space) = (true, false);
        for turn in turns {
            if let Some(bos) = self.tokenizer.bos().filter(|_| starts) {
                self.token(bos, turn.is_trained);
            }
            let goes_on = !starts && !after_space;
            for part in &turn.parts {
                let text = part.trim_end_matches(' ');
                if goes_on {
                    self.text_after(&format!("\n{text}"), line_break, turn.is_trained)?;
                } else {
                    self.text(text, turn.is_trained)?;
                }
            }
            after_space = turn.parts.last().is_some_and(|part| part.ends_with(' '));
            starts = turn.role == Role::Assistant;
            if starts && !turn.is_open {
                self.token(self.tokenizer.eos(), turn.is_trained);
            }
        }
        Ok(())
    }

    fn chat_ml(&mut self, turns: &[Turn], index: usize) -> Result<(), String> {
        let Format::ChatMl { start, end, tool_call } = *self.tokenizer.format() else { return Ok(()) };
        let turn = &turns[index];
        let trained = turn.is_trained;
        let is_tool = |turn: &Turn| turn.role == Role::Tool;
        // Qwen 2.5 and 3 show what tools answered, one after the other, in one message of the user's; Qwen 2 shows it bare.
        let wraps_answer = is_tool(turn) && tool_call.is_some();
        let follows_tool = index > 0 && is_tool(&turns[index - 1]);
        let before_tool = turns.get(index + 1).is_some_and(is_tool);
        let call = tool_call.filter(|_| turn.calls_tool);

        let role = if is_tool(turn) { "user" } else { turn.role.name() };
        if !is_tool(turn) || (wraps_answer && !follows_tool) {
            self.token(start, trained);
            self.text(&format!("{role}\n"), trained)?;
        }
        let (mut before, mut after) = (String::new(), String::new());
        if turn.answers_call && wraps_answer {
            before.push_str("<tool_response>\n");
            after.push_str(if before_tool { "\n</tool_response>\n" } else { "\n</tool_response>" });
        } else if wraps_answer {
            self.text(if follows_tool { "\n<tool_response>\n" } else { "<tool_response>\n" }, trained)?;
        }
        if let Some((call, _)) = call {
            self.token(call, trained);
            self.text("\n", trained)?;
        }
        if !turn.calls.is_empty() && turn.parts.iter().any(|part| !part.is_empty()) {
            after.push('\n');
        }
        self.text_within(&before, &turn.parts, &after, trained)?;
        self.qwen_calls(&turn.calls, trained)?;
        if let Some((_, end_of_call)) = call {
            self.text("\n", trained)?;
            self.token(end_of_call, trained);
        }
        if wraps_answer && !turn.answers_call {
            self.text("\n</tool_response>", trained)?;
        }
        // The last answer ends with EOS, which is the same token.
        let is_last_answer = turn.role == Role::Assistant && index + 1 == turns.len();
        let closes = if is_tool(turn) { wraps_answer && !before_tool } else { !is_last_answer };
        if closes {
            self.token(end, trained);
            self.text("\n", trained)?;
        }
        Ok(())
    }

    /// The parts of a text, what stands before and after it encoded with the first and the last of them.
    fn text_within(&mut self, before: &str, parts: &[&str], after: &str, trained: bool) -> Result<(), String> {
        let (parts, last) = if parts.is_empty() { (&[""][..], 0) } else { (parts, parts.len() - 1) };
        parts.iter().enumerate().try_for_each(|(index, part)| {
            let (before, after) = (if index == 0 { before } else { "" }, if index == last { after } else { "" });
            self.text(&format!("{before}{part}{after}"), trained)
        })
    }

    fn qwen_calls(&mut self, calls: &[Call], trained: bool) -> Result<(), String> {
        let Format::ChatMl { tool_call: Some((start, end)), .. } = *self.tokenizer.format() else { return Ok(()) };
        for (index, call) in calls.iter().enumerate() {
            if index > 0 {
                self.text("\n", trained)?;
            }
            // The two are tokens wherever they are spelled, as Qwen's files have it; JSON can spell them otherwise.
            let json = call.json("arguments").replace("<tool_call>", "\\u003ctool_call>");
            let json = json.replace("</tool_call>", "\\u003c/tool_call>");
            self.token(start, trained);
            self.text(&format!("\n{json}\n"), trained)?;
            self.token(end, trained);
        }
        Ok(())
    }

    /// The tokens of the whole conversation; a message has those that it adds to the conversation before it.
    ///
    /// A beginning that the template refuses (a system message alone, often) counts as the next message's. Where a template
    /// writes a beginning otherwise than the whole does (Qwen 3 and Mistral write the last message in its own way), what is
    /// learnt is looked for by its content. EOS follows where the template ends the last message by no token that stops.
    fn rendered(&mut self, template: &ChatTemplate, turns: &[Turn]) -> Result<(), String> {
        let chat = chat(turns);
        let encode = |count: usize| -> Result<Vec<u32>, String> {
            self.tokenizer.encode(&template.render(&chat[..count], false)?).map_err(|error| one_line(&error))
        };
        if chat.iter().any(|message| !message.tool_calls.is_empty()) {
            let silent: Vec<ChatMessage> = chat.iter().map(without_calls).collect();
            if template.render(&silent, false).is_ok_and(|text| template.render(&chat, false) == Ok(text)) {
                return Err("it calls tools, and the chat template writes no `tool_calls`".to_owned());
            }
        }
        let tokens = encode(turns.len())?;
        let (mut trained, mut last_start) = (vec![], 0);
        for (count, turn) in (1..).zip(turns) {
            last_start = trained.len();
            let end = if count == turns.len() {
                tokens.len()
            } else {
                let begins = encode(count).unwrap_or_default();
                let end = common(&begins, &tokens);
                if end < begins.len() {
                    trained = self.trained_by_content(template, turns, &chat, &tokens)?;
                    last_start = 0;
                    break;
                }
                end.max(last_start)
            };
            trained.resize(end, turn.is_trained);
        }
        let ends = tokens[last_start..].iter().any(|token| self.tokenizer.stop_tokens().contains(token));
        self.encoded = Encoded { tokens, trained, was_cut: false };
        if !ends {
            self.token(self.tokenizer.eos(), turns.last().is_some_and(|turn| turn.is_trained));
        }
        Ok(())
    }

    /// Which tokens carry loss, by the place of each message's content in the whole: from its first token to the one that
    /// stops after it. The place is where the text changes when a letter of no language is put before it, or after it; of a
    /// message that calls tools, what changes when the letter stands instead of text and calls.
    fn trained_by_content(
        &self,
        template: &ChatTemplate,
        turns: &[Turn],
        chat: &[ChatMessage],
        tokens: &[u32],
    ) -> Result<Vec<bool>, String> {
        const MARK: char = '\u{e000}';
        let whole: Vec<char> = template.render(chat, false)?.chars().collect();
        let marked = |content: String, index: usize| -> Result<Vec<char>, String> {
            let mut marked = chat.to_vec();
            marked[index] = ChatMessage { content: Some(content), ..without_calls(&marked[index]) };
            Ok(template.render(&marked, false)?.chars().collect())
        };
        let tokens_before = |length: usize| -> Result<usize, String> {
            let before: String = whole[..length].iter().collect();
            let encoded = self.tokenizer.encode(&before).map_err(|error| one_line(&error))?;
            Ok(common(&encoded, tokens))
        };
        let mut trained = vec![false; tokens.len()];
        for (index, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.is_trained) {
            let (first, last) = if turn.calls.is_empty() {
                let content = chat[index].content.as_deref().unwrap_or_default();
                let (before, after) =
                    (marked(format!("{MARK}{content}"), index)?, marked(format!("{content}{MARK}"), index)?);
                (common(&whole, &before), common(&whole, &after))
            } else {
                let instead = marked(MARK.to_string(), index)?;
                let after = whole.iter().rev().zip(instead.iter().rev()).take_while(|(a, b)| a == b).count();
                (common(&whole, &instead), whole.len() - after)
            };
            let start = tokens_before(first)?;
            let mut end = tokens_before(last)?.max(start);
            if tokens.get(end).is_some_and(|token| self.tokenizer.stop_tokens().contains(token)) {
                end += 1;
            }
            trained[start..end].fill(true);
        }
        Ok(trained)
    }
}

fn without_calls(message: &ChatMessage) -> ChatMessage {
    ChatMessage { tool_calls: vec![], ..message.clone() }
}

/// How many elements two lists begin with alike.
fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn one_line(error: &Error) -> String {
    std::iter::once(&error.message).chain(&error.causes).map(String::as_str).collect::<Vec<_>>().join(": ")
}
