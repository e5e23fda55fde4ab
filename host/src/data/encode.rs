//! Messages to token ids: the rules that decide every number of a run.
//!
//! A sample is BOS (when the tokenizer's files add one), the parts of the messages, EOS. Each part is encoded on its own
//! after its trailing spaces are stripped (spaces only); joined first, other tokens come out at the seams. Assistant
//! messages carry loss, user messages too under `train_on_input`, system messages never; a message's own `train` wins.
//! EOS belongs to the last message and BOS to the first. Too long a sample keeps its first `max_seq_len` tokens, the last
//! of them replaced by EOS, which carries loss only where the token it replaces did. That teaches an answer to end where
//! it was cut, which a reader may question; it is what torchtune does, and the recorded losses have it.

use crate::data::template::{Message, Role};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

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
    /// A training sample, or why the row is bad.
    pub fn sample(&self, messages: &[Message]) -> Result<Encoded, String> {
        let (Some(first), Some(last)) = (messages.first(), messages.last()) else {
            return Err("the template made no message of it".to_owned());
        };
        let limit = self.max_seq_len.unwrap_or(usize::MAX);
        let mut encoded = Encoded::default();
        encoded.push(self.tokenizer.bos(), self.is_trained(first));
        for message in messages {
            for part in &message.parts {
                // What lies beyond the cut need not be encoded.
                if encoded.tokens.len() > limit {
                    break;
                }
                encoded.push(
                    encode_part(self.tokenizer, part).map_err(|error| one_line(&error))?,
                    self.is_trained(message),
                );
            }
        }
        encoded.push([self.tokenizer.eos()], self.is_trained(last));
        if encoded.tokens.len() > limit {
            encoded.tokens.truncate(limit);
            encoded.trained.truncate(limit);
            encoded.was_cut = true;
            if let Some(token) = encoded.tokens.last_mut() {
                *token = self.tokenizer.eos();
            }
        }
        Ok(encoded)
    }

    fn is_trained(&self, message: &Message) -> bool {
        message.train.unwrap_or(match message.role {
            Role::System => false,
            Role::User => self.train_on_input,
            Role::Assistant => true,
        })
    }
}

/// What a model is given to continue: the tokens of a sample up to its last answer, without the answer and EOS.
pub fn encode_prompt(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    let messages = match messages {
        [asked @ .., answer] if answer.role == Role::Assistant => asked,
        all => all,
    };
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    for part in messages.iter().flat_map(|message| &message.parts) {
        tokens.extend(encode_part(tokenizer, part)?);
    }
    Ok(tokens)
}

fn encode_part(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    tokenizer.encode(text.trim_end_matches(' '))
}

fn one_line(error: &Error) -> String {
    std::iter::once(&error.message).chain(&error.causes).map(String::as_str).collect::<Vec<_>>().join(": ")
}

impl Encoded {
    fn push(&mut self, tokens: impl IntoIterator<Item = u32>, trained: bool) {
        self.tokens.extend(tokens);
        self.trained.resize(self.tokens.len(), trained);
    }
}
