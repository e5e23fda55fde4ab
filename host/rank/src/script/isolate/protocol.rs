//! What a worker and the process of a template say to each other: messages with their length before them.

use std::io::{self, Read, Write};

use host::Error;
use host::config::plan::GuestLimits;
use host::data::template::{Outcome, Row};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
pub enum Request {
    /// The first one.
    Open(Opening),
    Configure(Vec<String>),
    Render(Vec<Row>),
    Renew,
}

#[derive(Serialize, Deserialize)]
pub struct Opening {
    /// A `GuestRef`, whose path is for messages only. As JSON, since its settings are.
    pub guest: String,
    pub bytes: Vec<u8>,
    pub limits: GuestLimits,
}

/// One for each request, after any number of lines.
#[derive(Serialize, Deserialize)]
pub enum Answer {
    /// The guest logs a line.
    Line(String),
    /// The template stands, and what of the sandbox this kernel does not have.
    Opened {
        missing: Vec<String>,
    },
    Columns(Vec<String>),
    Outcomes(Vec<Outcome>),
    Renewed,
    Failed(Error),
}

pub fn write(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    // In one write, so that lines of several threads do not mix.
    let mut frame = postcard::to_extend(message, vec![0; size_of::<u64>()]).map_err(io::Error::other)?;
    let length = (frame.len() - size_of::<u64>()) as u64;
    frame[..size_of::<u64>()].copy_from_slice(&length.to_le_bytes());
    to.write_all(&frame)?;
    to.flush()
}

/// The next message; none where the other side has gone, in the middle of one too.
pub fn read<T: DeserializeOwned>(mut from: impl Read, longest: u64) -> io::Result<Option<T>> {
    let mut length = [0; size_of::<u64>()];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u64::from_le_bytes(length);
    if length > longest {
        return Err(io::Error::other(format!("a message of {length} bytes; {longest} are read")));
    }
    let mut message = vec![];
    from.take(length).read_to_end(&mut message)?;
    if (message.len() as u64) < length {
        return Ok(None);
    }
    postcard::from_bytes(&message).map(Some).map_err(io::Error::other)
}
