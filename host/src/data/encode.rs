//! Messages to token ids: the rules that decide every number of a run.
//!
//! Each part of a message is encoded on its own; joined first, other tokens come out at the seams. Assistant messages carry
//! loss, user and tool messages too under `train_on_input`, system messages never; a message's own `train` wins. What a
//! format writes around a message (header, end of turn) carries loss when the message does. Each format of
//! [`Format`] is torchtune's of that name, token for token, but for what its users reported as wrong: EOS of the Qwen
//! formats is trained also where `max_seq_len` is set.
//!
//! Too long a sample keeps its first `max_seq_len` tokens, the last of them replaced by EOS, which carries loss only where
//! the token it replaces did (never under Llama 3, whose EOS has none). That teaches an answer to end where it was cut,
//! which a reader may question; it is what torchtune does, and the recorded losses have it.

use crate::config::plan::Truncation;
use crate::data::template::{Message, Role};
use crate::error::{Error, Result};
use crate::tokenizer::{ChatMessage, ChatTemplate, Format, Tokenizer, is_blank};

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
        let turns = turns(tokenizer.turn_texts(), messages, |message| self.is_trained(message));
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
        [asked @ .., answer] if answer.role == Role::Assistant => (asked, &answer.parts[..]),
        all => (all, &[][..]),
    };
    let mut turns = turns(tokenizer.turn_texts(), asked, |_| false);
    let texts = tokenizer.turn_texts().iter().find(|(role, _)| *role == Role::Assistant);
    let before_answer = texts.map(|(_, [before, _])| before.as_str()).into_iter();
    let begun: Vec<&str> =
        before_answer.chain(begun.iter().map(String::as_str)).filter(|part| !part.is_empty()).collect();
    if let Format::ChatTemplate(template) = tokenizer.format() {
        let text = template.render(&chat(&turns), true).map_err(failed)?;
        return tokenizer.encode(&(text + &begun.concat()));
    }
    turns.push(Turn { role: Role::Assistant, parts: begun, is_trained: false, calls_tool: false, is_open: true });
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
    is_trained: bool,
    /// The assistant asks a tool, whose answer follows.
    calls_tool: bool,
    /// The answer is still to be written: nothing ends it.
    is_open: bool,
}

fn turns<'m>(
    texts: &'m [(Role, [String; 2])],
    messages: &'m [Message],
    is_trained: impl Fn(&Message) -> bool,
) -> Vec<Turn<'m>> {
    let turn = |(index, message): (usize, &'m Message)| {
        let mut parts: Vec<&str> = message.parts.iter().map(String::as_str).collect();
        let role = message.role;
        if let Some((_, [before, after])) = texts.iter().find(|(of, _)| *of == role) {
            parts.insert(0, before);
            parts.push(after);
            parts.retain(|part| !part.is_empty());
        }
        let answers = messages.get(index + 1).is_some_and(|next| next.role == Role::Tool);
        let calls_tool = role == Role::Assistant && answers;
        Turn { role, parts, is_trained: is_trained(message), calls_tool, is_open: false }
    };
    messages.iter().enumerate().map(turn).collect()
}

fn chat(turns: &[Turn]) -> Vec<ChatMessage> {
    turns.iter().map(|turn| ChatMessage { role: turn.role.name(), content: turn.parts.concat() }).collect()
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
        match *self.tokenizer.format() {
            Format::Plain => {
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
            Format::Turns { line_break } => self.turns(turns, line_break),
            Format::ChatMl { .. } => (0..turns.len()).try_for_each(|index| self.chat_ml(turns, index)),
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
        if turn.is_open {
            return Ok(());
        }
        let goes_on = turn.calls_tool || turn.role == Role::Tool;
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
        if wraps_answer {
            self.text(if follows_tool { "\n<tool_response>\n" } else { "<tool_response>\n" }, trained)?;
        }
        if let Some((call, _)) = call {
            self.token(call, trained);
            self.text("\n", trained)?;
        }
        for part in &turn.parts {
            self.text(part, trained)?;
        }
        if let Some((_, end_of_call)) = call {
            self.text("\n", trained)?;
            self.token(end_of_call, trained);
        }
        if wraps_answer {
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
    /// stops after it. The place is where the text changes when a letter of no language is put before it, or after it.
    fn trained_by_content(
        &self,
        template: &ChatTemplate,
        turns: &[Turn],
        chat: &[ChatMessage],
        tokens: &[u32],
    ) -> Result<Vec<bool>, String> {
        const MARK: char = '\u{e000}';
        let whole: Vec<char> = template.render(chat, false)?.chars().collect();
        let tokens_before = |content: String, index: usize| -> Result<usize, String> {
            let mut marked = chat.to_vec();
            marked[index].content = content;
            let marked: Vec<char> = template.render(&marked, false)?.chars().collect();
            let before: String = whole[..common(&whole, &marked)].iter().collect();
            let encoded = self.tokenizer.encode(&before).map_err(|error| one_line(&error))?;
            Ok(common(&encoded, tokens))
        };
        let mut trained = vec![false; tokens.len()];
        for (index, _) in turns.iter().enumerate().filter(|(_, turn)| turn.is_trained) {
            let content = &chat[index].content;
            let start = tokens_before(format!("{MARK}{content}"), index)?;
            let mut end = tokens_before(format!("{content}{MARK}"), index)?.max(start);
            if tokens.get(end).is_some_and(|token| self.tokenizer.stop_tokens().contains(token)) {
                end += 1;
            }
            trained[start..end].fill(true);
        }
        Ok(trained)
    }
}

/// How many elements two lists begin with alike.
fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn one_line(error: &Error) -> String {
    std::iter::once(&error.message).chain(&error.causes).map(String::as_str).collect::<Vec<_>>().join(": ")
}
