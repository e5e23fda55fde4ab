//! Node 0, where the others meet.

use std::collections::BTreeMap;
use std::net::{TcpListener, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use super::wire::{FromFirst, FromNode, Line};
use super::{
    Checkpoint, Endpoint, Hello, Next, Others, Outcome, POLL, Place, QUIET, Round, claim_port, listen, may_restart,
    port_error, stopped_early,
};
use crate::error::{Error, Kind, Result};
use crate::launch::ranks::{LONGEST_STOP, Requests};

/// For a connection to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(10);

pub(in crate::launch) struct First {
    place: Place,
    /// None where there are no others.
    meeting: Option<(TcpListener, Endpoint)>,
    say: fn(&str),
    strangers: Vec<(Line, Instant)>,
    nodes: BTreeMap<usize, Node>,
    /// Who was turned away, and why.
    refused: Vec<String>,
    /// How the nodes of this round ended, in that order.
    outcomes: Vec<(usize, Outcome)>,
    attempt: usize,
    checkpoint: Option<Checkpoint>,
}

struct Node {
    line: Line,
    is_ready: bool,
    /// What it was told of the others.
    told: Others,
}

impl First {
    pub fn open(place: &Place, say: fn(&str)) -> Result<Self> {
        let meeting = match &place.endpoint {
            None => None,
            Some(endpoint) => {
                check_own(endpoint)?;
                let listener = listen(endpoint.port)
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .map_err(|error| {
                        port_error(error, endpoint.port, "the nodes meet there (`--rdzv-endpoint`)")
                            .hint("name another on every node; or is a second node started with `--node-rank 0` here?")
                    })?;
                Some((listener, endpoint.clone()))
            }
        };
        Ok(Self {
            place: place.clone(),
            meeting,
            say,
            strangers: vec![],
            nodes: BTreeMap::new(),
            refused: vec![],
            outcomes: vec![],
            attempt: 0,
            checkpoint: None,
        })
    }

    pub fn meet(&mut self, requests: &mut Requests) -> Result<Round> {
        let round = self.all_here(requests).and_then(|()| claim_port(self.place.master_port));
        let master_port = match round {
            Ok(port) => port,
            Err(error) => {
                self.tell_all(&FromFirst::Refused(error.clone()));
                return Err(error);
            }
        };
        self.outcomes.clear();
        let (attempt, checkpoint) = (self.attempt, self.checkpoint.clone());
        self.tell_all(&FromFirst::Start { attempt, master_port, checkpoint: checkpoint.clone() });
        self.nodes.values_mut().for_each(|node| (node.is_ready, node.told) = (false, Others::Running));
        // By whatever name the others know this node: here is an address at which it was reached.
        let reached = self.nodes.values().next().map(|node| node.line.local.to_string());
        let master_addr = reached.unwrap_or_else(|| self.place.master_addr.clone());
        Ok(Round { attempt, master_addr, master_port, checkpoint })
    }

    fn all_here(&mut self, requests: &mut Requests) -> Result<()> {
        let started = Instant::now();
        let mut is_said = false;
        loop {
            self.poll()?;
            let missing = self.missing();
            if missing.is_empty() {
                return Ok(());
            }
            if requests.asked() {
                return Err(stopped_early());
            }
            let Some((_, endpoint)) = &self.meeting else { return Ok(()) };
            let timeout = self.place.timeout;
            if started.elapsed() > timeout {
                let (who, n) = (named("node", &missing), self.place.me.num_nodes);
                let error =
                    Error::run(format!("{who} of {n} did not come to `{endpoint}` within {} s", timeout.as_secs()));
                return Err(self.refused.iter().fold(error, Error::cause).hint(format!(
                    "`--node-rank` counts from 0 to {} and `--rdzv-endpoint {endpoint}` is the same on every node; \
                     `--rdzv-timeout` is how long they wait",
                    n - 1
                )));
            }
            if started.elapsed() > QUIET && !is_said {
                is_said = true;
                (self.say)(&format!("waiting at `{endpoint}` for {}", named("node", &missing)));
            }
            std::thread::sleep(POLL);
        }
    }

    fn missing(&self) -> Vec<usize> {
        (1..self.place.me.num_nodes).filter(|rank| !self.nodes.get(rank).is_some_and(|node| node.is_ready)).collect()
    }

    pub fn others(&mut self) -> Others {
        // Who comes late and does not fit is told so, and changes nothing here.
        let _ = self.poll();
        let news = match &self.outcomes[..] {
            [] => Others::Running,
            outcomes if outcomes.iter().all(|(_, outcome)| outcome.agreed) => Others::Ended,
            _ => Others::Failed,
        };
        self.tell_of_others(news);
        news
    }

    pub fn settle(&mut self, own: Outcome, requests: &mut Requests, newest: impl Fn() -> Option<Checkpoint>) -> Next {
        self.outcomes.push((0, own));
        let mut give_up = None;
        while self.outcomes.len() < self.place.me.num_nodes {
            if self.others() == Others::Failed || requests.asked() {
                self.tell_of_others(Others::Failed);
                let give_up = *give_up.get_or_insert(Instant::now() + LONGEST_STOP);
                if Instant::now() > give_up {
                    break;
                }
            }
            std::thread::sleep(POLL);
        }
        for rank in 1..self.place.me.num_nodes {
            if !self.is_over(rank) {
                self.outcomes.push((rank, lost(&self.place.me, rank)));
                self.nodes.remove(&rank);
            }
        }
        let asked = requests.asked() || self.outcomes.iter().any(|(_, outcome)| outcome.asked);
        let error = self.cause();
        let restarts = !asked && self.attempt < self.place.me.max_restarts && error.as_ref().is_some_and(may_restart);
        self.tell_all(&FromFirst::Over { error: error.clone(), restarts });
        match error {
            None => Next::End(Ok(())),
            Some(why) if restarts => {
                self.attempt += 1;
                self.checkpoint = newest();
                Next::Restart(why)
            }
            Some(why) => Next::End(Err(why)),
        }
    }

    /// The failure that explains the others: one that a node has of its own, and that we heard of first.
    fn cause(&self) -> Option<Error> {
        let failed = || self.outcomes.iter().filter_map(|(node, outcome)| Some((*node, outcome.error.as_ref()?)));
        let precedence = |error: &Error| match error.kind {
            Kind::Peer => 2,
            Kind::Interrupted => 1,
            _ => 0,
        };
        let (node, first) = failed().min_by_key(|(_, error)| precedence(error))?;
        let is_everybodys = failed().filter(|(_, error)| *error == first).count() == self.place.me.num_nodes;
        let mut error = first.clone();
        if !is_everybodys && error.kind != Kind::Interrupted && error.message != went_away(&self.place.me, node) {
            error.rank.get_or_insert(node * self.place.me.nproc);
        }
        Some(error)
    }

    fn is_over(&self, rank: usize) -> bool {
        self.outcomes.iter().any(|(node, _)| *node == rank)
    }

    /// Tells those nodes that have not ended, once.
    fn tell_of_others(&mut self, news: Others) {
        let over: Vec<usize> = self.outcomes.iter().map(|(rank, _)| *rank).collect();
        for (_, node) in self.nodes.iter_mut().filter(|(rank, node)| !over.contains(rank) && node.told < news) {
            node.told = news;
            node.line.tell(if news == Others::Failed { &FromFirst::Stop } else { &FromFirst::Ended });
        }
    }

    fn tell_all(&mut self, message: &FromFirst) {
        self.nodes.values_mut().for_each(|node| node.line.tell(message));
    }

    /// Hears what has come. An error is one for all nodes.
    fn poll(&mut self) -> Result<()> {
        let Some((listener, _)) = &self.meeting else { return Ok(()) };
        while let Ok((stream, _)) = listener.accept() {
            if let Ok(line) = Line::new(stream) {
                self.strangers.push((line, Instant::now()));
            }
        }
        for rank in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.hear(rank);
        }
        let mut result = Ok(());
        for (mut line, since) in std::mem::take(&mut self.strangers) {
            match line.hear() {
                Ok(None) if since.elapsed() < INTRODUCTION => self.strangers.push((line, since)),
                Ok(Some(FromNode::Hello(hello))) => result = result.and(self.admit(&hello, line)),
                _ if line.is_silent() => {}
                _ => {
                    let version = &self.place.me.version;
                    let what = format!("`{}` is no launcher of `host` {version}, as node 0 is", line.peer);
                    line.tell(&FromFirst::Refused(Error::config(what.clone())));
                    self.refused.push(what);
                }
            }
        }
        result
    }

    fn hear(&mut self, rank: usize) {
        while let Some(node) = self.nodes.get_mut(&rank) {
            match node.line.hear() {
                Ok(None) => return,
                Ok(Some(FromNode::Hello(_))) => node.is_ready = true,
                Ok(Some(FromNode::Ended(outcome))) => self.outcomes.push((rank, outcome)),
                Err(_) => {
                    self.nodes.remove(&rank);
                    if !self.is_over(rank) {
                        self.outcomes.push((rank, lost(&self.place.me, rank)));
                    }
                }
            }
        }
    }

    /// Takes a node in, or turns it away; an error where all nodes have to end for it.
    fn admit(&mut self, hello: &Hello, mut line: Line) -> Result<()> {
        let mut refuse = |error: &Error| {
            self.refused.push(format!("`{}` was turned away: {}", line.peer, error.message));
            line.tell(&FromFirst::Refused(error.clone()));
        };
        let (us, rank) = (&self.place.me, hello.node_rank);
        if hello.run_id != us.run_id {
            let (theirs, ours) = (&hello.run_id, &us.run_id);
            let what = format!("node {rank} belongs to the run `{theirs}`, node 0 to `{ours}` (`--rdzv-id`)");
            refuse(
                &Error::config(what).hint("each run meets at a port of its own, and has one `--rdzv-id` on all nodes"),
            );
            return Ok(());
        }
        if let Some(error) = difference(us, hello) {
            refuse(&error);
            return Err(error);
        }
        if let Some(taken) = self.nodes.get(&rank) {
            let error = Error::config(format!("node rank {rank} is taken, by `{}`", taken.line.peer))
                .hint(format!("each node has a `--node-rank` of its own, from 0 to {}", us.num_nodes - 1));
            refuse(&error);
            return Ok(());
        }
        line.tell(&FromFirst::Welcome);
        self.nodes.insert(rank, Node { line, is_ready: true, told: Others::Running });
        Ok(())
    }
}

/// What is not the same on both nodes.
fn difference(first: &Hello, other: &Hello) -> Option<Error> {
    let facts = |hello: &Hello| {
        let Hello { version, num_nodes, nproc, max_restarts, run_id: _, node_rank: _ } = hello;
        [
            format!("`--nnodes {num_nodes}`"),
            format!("`--nproc {nproc}`"),
            format!("`--max-restarts {max_restarts}`"),
            format!("version {version} of `host`"),
        ]
    };
    let (ours, theirs) = facts(first).into_iter().zip(facts(other)).find(|(ours, theirs)| ours != theirs)?;
    Some(
        Error::config(format!("node {} was started with {theirs}, node 0 with {ours}", other.node_rank))
            .hint("start every node with the same command, up to `--node-rank`"),
    )
}

fn went_away(us: &Hello, node: usize) -> String {
    let ranks: Vec<usize> = (node * us.nproc..(node + 1) * us.nproc).collect();
    format!("node {node} went away, with {}", named("rank", &ranks))
}

fn lost(us: &Hello, node: usize) -> Outcome {
    let error = Error::run(went_away(us, node))
        .hint("its `host run` was killed, its machine is down, or the network between the two");
    Outcome { error: Some(error), agreed: false, asked: false }
}

/// Checks that the endpoint is on this machine, as node 0 is.
fn check_own(endpoint: &Endpoint) -> Result<()> {
    let addresses = (endpoint.host.as_str(), endpoint.port).to_socket_addrs().map_err(|error| {
        Error::config(format!("the rendezvous endpoint `{endpoint}` cannot be resolved"))
            .cause(error)
            .hint("`--rdzv-endpoint` is a name or address of node 0, as the other nodes know it")
    })?;
    // Only an address of this machine can be bound.
    let is_own = |mut address: std::net::SocketAddr| {
        address.set_port(0);
        UdpSocket::bind(address).is_ok()
    };
    if addresses.into_iter().any(is_own) {
        return Ok(());
    }
    Err(Error::config(format!("`--node-rank 0`, but the rendezvous endpoint `{endpoint}` is another machine"))
        .hint("node 0 is the one at the endpoint; each node has a `--node-rank` of its own"))
}

fn named(noun: &str, numbers: &[usize]) -> String {
    let list = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    format!("{noun}{} {list}", if numbers.len() == 1 { "" } else { "s" })
}
