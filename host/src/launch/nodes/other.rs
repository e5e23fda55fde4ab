//! A node other than 0: it connects, and does what node 0 says.

use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::wire::{FromFirst, FromNode, Line};
use super::{Endpoint, Next, Others, Outcome, POLL, Place, QUIET, Round, may_restart, stopped_early};
use crate::error::{Error, Kind, Result};
use crate::launch::ranks::Requests;

const CONNECT: Duration = Duration::from_secs(2);
/// Between two tries to connect.
const PAUSE: Duration = Duration::from_millis(200);

pub(in crate::launch) struct Other {
    place: Place,
    endpoint: Endpoint,
    say: fn(&str),
    line: Option<Line>,
    /// As node 0 says; where it is gone, ours have to stop too.
    others: Others,
    attempt: usize,
}

impl Other {
    pub fn new(place: &Place, endpoint: &Endpoint, say: fn(&str)) -> Self {
        Self { place: place.clone(), endpoint: endpoint.clone(), say, line: None, others: Others::Running, attempt: 0 }
    }

    pub fn meet(&mut self, requests: &mut Requests) -> Result<Round> {
        let started = Instant::now();
        let (mut is_welcome, mut is_said) = (false, false);
        let mut problem = String::new();
        let hello = FromNode::Hello(self.place.me.clone());
        if let Some(line) = &mut self.line {
            (is_welcome, self.others) = (true, Others::Running);
            line.tell(&hello);
        }
        loop {
            if requests.asked() {
                return Err(stopped_early());
            }
            // Once it is taken in, node 0 watches the time for all.
            if !is_welcome && started.elapsed() > self.place.timeout {
                return Err(self.unreached(&problem));
            }
            if !is_welcome && started.elapsed() > QUIET && !is_said {
                is_said = true;
                (self.say)(&format!("waiting for node 0 at `{}`: {problem}", self.endpoint));
            }
            let Some(line) = &mut self.line else {
                match self.connect() {
                    Ok(mut line) => {
                        line.tell(&hello);
                        self.line = Some(line);
                        self.others = Others::Running;
                        problem = "it does not answer".into();
                    }
                    Err(why) => {
                        problem = why;
                        std::thread::sleep(PAUSE);
                    }
                }
                continue;
            };
            match line.hear() {
                Ok(Some(FromFirst::Welcome)) => is_welcome = true,
                Ok(Some(FromFirst::Refused(error))) => return Err(error),
                Ok(Some(FromFirst::Start { attempt, master_port, checkpoint })) => {
                    self.attempt = attempt;
                    return Ok(Round { attempt, master_addr: line.peer.to_string(), master_port, checkpoint });
                }
                // It came while the others ended without it.
                Ok(Some(FromFirst::Over { error, restarts: false })) => {
                    return Err(error.unwrap_or_else(|| Error::run("the run is over")));
                }
                Ok(Some(FromFirst::Ended | FromFirst::Stop | FromFirst::Over { .. })) => {}
                Ok(None) => std::thread::sleep(POLL),
                Err(_) => {
                    (self.line, is_welcome) = (None, false);
                    problem = "it closes the connection".into();
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    fn connect(&self) -> std::result::Result<Line, String> {
        let Endpoint { host, port } = &self.endpoint;
        let addresses = (host.as_str(), *port).to_socket_addrs().map_err(|error| error.to_string())?;
        let mut problem = "the name has no address".to_owned();
        for address in addresses {
            let line = TcpStream::connect_timeout(&address, CONNECT).and_then(Line::new);
            match line {
                Ok(line) => return Ok(line),
                Err(error) => problem = error.to_string(),
            }
        }
        Err(problem)
    }

    fn unreached(&self, problem: &str) -> Error {
        let (endpoint, seconds) = (&self.endpoint, self.place.timeout.as_secs());
        Error::run(format!("node 0 could not be reached at `{endpoint}` within {seconds} s"))
            .cause(problem)
            .hint("start it with `--node-rank 0`, and see that nothing between the two closes the port")
            .hint("`--rdzv-timeout` is how long they wait")
    }

    pub fn others(&mut self) -> Others {
        while let (Some(line), Others::Running | Others::Ended) = (&mut self.line, self.others) {
            match line.hear() {
                Ok(None) => break,
                Ok(Some(FromFirst::Ended)) => self.others = Others::Ended,
                Ok(Some(FromFirst::Stop)) => self.others = Others::Failed,
                Ok(Some(_)) => {}
                Err(_) => (self.line, self.others) = (None, Others::Failed),
            }
        }
        self.others
    }

    pub fn settle(&mut self, own: Outcome, requests: &mut Requests) -> Next {
        if let Some(line) = &mut self.line {
            line.tell(&FromNode::Ended(own.clone()));
        }
        while let Some(line) = &mut self.line {
            match line.hear() {
                Ok(Some(FromFirst::Over { error, restarts })) => {
                    return match error {
                        None => Next::End(Ok(())),
                        Some(why) if restarts => Next::Restart(why),
                        Some(why) => Next::End(Err(why)),
                    };
                }
                Ok(Some(_)) => {}
                Ok(None) if requests.asked() && !own.asked => return Next::End(Err(stopped_waiting())),
                Ok(None) => std::thread::sleep(POLL),
                Err(_) => self.line = None,
            }
        }
        // Without node 0 there is nobody to decide; it may come back.
        let why = match own.error {
            Some(error) if error.kind != Kind::Peer => error,
            _ => Error::run("node 0 went away")
                .hint("its `host run` was killed, its machine is down, or the network between the two"),
        };
        let asked = own.asked || requests.asked();
        if asked || self.attempt >= self.place.me.max_restarts || !may_restart(&why) {
            return Next::End(Err(why));
        }
        self.attempt += 1;
        Next::Restart(why)
    }
}

fn stopped_waiting() -> Error {
    Error::interrupted("stopped before the other nodes had ended")
}
