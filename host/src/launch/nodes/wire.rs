//! What the launchers of one run say to each other: one JSON value a line, over TCP.
//!
//! The front has no libtorch, so no c10d store; and rank 0's store dies with rank 0, when launchers have most to say.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A node that is silent for so long, with the kernel asking, is gone.
const SILENCE: Duration = Duration::from_secs(30);
/// For a message to leave; the others are as short as the few lines of an error.
const SEND: Duration = Duration::from_secs(2);
const LONGEST: usize = 1 << 20;

/// Who a node is, and what all nodes have to agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version: String,
    pub run_id: String,
    pub num_nodes: usize,
    pub node_rank: usize,
    pub nproc: usize,
    pub max_restarts: usize,
}

/// How the ranks of one node ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub error: Option<Error>,
    /// All came to their end by themselves and together with those of other nodes: done, or stopped on request.
    pub agreed: bool,
    /// Somebody asked this node to stop.
    pub asked: bool,
}

/// A checkpoint by its name in the output folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub name: String,
    pub step: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum FromNode {
    Hello(Hello),
    Ended(Outcome),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum FromFirst {
    Welcome,
    Refused(Error),
    Start {
        attempt: usize,
        master_port: u16,
        checkpoint: Option<Checkpoint>,
    },
    /// All ranks of another node have come to the end that all come to together.
    Ended,
    /// Ranks of another node failed.
    Stop,
    Over {
        error: Option<Error>,
        /// The nodes meet again, to go on.
        restarts: bool,
    },
}

/// The connection to another launcher. It never blocks: whoever waits polls.
#[derive(Debug)]
pub struct Line {
    stream: TcpStream,
    received: Vec<u8>,
    /// The other end.
    pub peer: IpAddr,
    /// Our own address, as the other end sees it.
    pub local: IpAddr,
    is_silent: bool,
}

/// The other end is gone, or no launcher.
#[derive(Debug)]
pub struct Lost;

impl Line {
    pub fn new(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, SILENCE / 3)?;
        sockopt::set_tcp_keepintvl(&stream, SILENCE / 6)?;
        sockopt::set_tcp_keepcnt(&stream, 4)?;
        // The same for what was sent and is not acknowledged.
        sockopt::set_tcp_user_timeout(&stream, SILENCE.as_millis() as u32)?;
        let (peer, local) = (stream.peer_addr()?.ip().to_canonical(), stream.local_addr()?.ip().to_canonical());
        Ok(Self { stream, received: vec![], peer, local, is_silent: true })
    }

    /// Returns the next message, `None` while there is none.
    pub fn hear<M: DeserializeOwned>(&mut self) -> Result<Option<M>, Lost> {
        let mut bytes = [0; 4096];
        let is_closed = loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => break true,
                Ok(length) => {
                    self.is_silent = false;
                    self.received.extend_from_slice(&bytes[..length]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break true,
            }
            if self.received.len() > LONGEST {
                return Err(Lost);
            }
        };
        // What was said before the line was closed counts.
        match self.received.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                serde_json::from_slice(&line).map(Some).map_err(|_| Lost)
            }
            None if is_closed => Err(Lost),
            None => Ok(None),
        }
    }

    /// Whether nothing has ever come: somebody looked whether the port is open.
    pub fn is_silent(&self) -> bool {
        self.is_silent
    }

    /// Sends a message. That it cannot be sent is found by the next [`Line::hear`].
    pub fn tell(&mut self, message: &impl Serialize) {
        let Ok(mut bytes) = serde_json::to_vec(message) else { return };
        bytes.push(b'\n');
        let (started, mut rest) = (Instant::now(), &bytes[..]);
        while !rest.is_empty() && started.elapsed() < SEND {
            match self.stream.write(rest) {
                Ok(length) => rest = &rest[length..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(5)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}
