//! The launchers of a run on several nodes: how they meet, stop together and start again together.
//!
//! Node 0 listens at the rendezvous endpoint for as long as the run lasts, the others stay connected to it. Once all are
//! there, node 0 names a port for rank 0's store and everybody starts its ranks; each such round has a store of its own, so
//! that nobody late from the one before can be taken for a member. When ranks of one node fail, node 0 makes all stop,
//! decides which failure is the cause and whether to begin another round, and all nodes end with the same words. A node
//! whose connection ends is gone, with its ranks.
//!
//! One node is a run of several nodes without the others.

mod first;
mod other;
pub mod wire;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use first::First;
use other::Other;
pub(super) use wire::{Checkpoint, Hello, Outcome};

use super::ranks::Requests;
use crate::error::{Error, Kind, Result};

const POLL: Duration = Duration::from_millis(20);
/// From here on it is said for whom a node waits.
const QUIET: Duration = Duration::from_secs(3);

/// Where the launchers of several nodes meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// This node, and where it meets the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub me: Hello,
    /// None: there are no others.
    pub endpoint: Option<Endpoint>,
    /// Where ranks of a single node meet.
    pub master_addr: String,
    /// Of rank 0's store; 0 takes any free one.
    pub master_port: u16,
    pub timeout: Duration,
}

/// One start of all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Round {
    pub attempt: usize,
    pub master_addr: String,
    pub master_port: u16,
    pub checkpoint: Option<Checkpoint>,
}

/// What is known of the ranks of other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Others {
    Running,
    /// Those of one of them have come to the end that all come to together.
    Ended,
    /// Ours have to stop.
    Failed,
}

/// What comes after a round.
pub(super) enum Next {
    End(Result<()>),
    /// After this failure.
    Restart(Error),
}

/// This launcher among the others.
pub(super) enum Nodes {
    First(First),
    Other(Other),
}

impl Nodes {
    pub fn open(place: &Place, say: fn(&str)) -> Result<Self> {
        Ok(match &place.endpoint {
            Some(endpoint) if place.me.node_rank > 0 => Self::Other(Other::new(place, endpoint, say)),
            _ => Self::First(First::open(place, say)?),
        })
    }

    /// Waits until all nodes are there.
    pub fn meet(&mut self, requests: &mut Requests) -> Result<Round> {
        match self {
            Self::First(node) => node.meet(requests),
            Self::Other(node) => node.meet(requests),
        }
    }

    /// What has become of the ranks of other nodes; asked while those here run.
    pub fn others(&mut self) -> Others {
        match self {
            Self::First(node) => node.others(),
            Self::Other(node) => node.others(),
        }
    }

    /// Tells the others how the ranks here ended, and waits for the end of theirs. `newest` finds the checkpoint to go on
    /// from.
    pub fn settle(&mut self, own: Outcome, requests: &mut Requests, newest: impl Fn() -> Option<Checkpoint>) -> Next {
        match self {
            Self::First(node) => node.settle(own, requests, newest),
            Self::Other(node) => node.settle(own, requests),
        }
    }
}

/// A mistake in a config stays one, and whoever asked for a stop does not want a start.
fn may_restart(error: &Error) -> bool {
    match error.kind {
        Kind::Run | Kind::Peer | Kind::Bug => true,
        Kind::Config | Kind::Interrupted => false,
    }
}

fn stopped_early() -> Error {
    Error::interrupted("stopped before all nodes had met")
}

/// Listens on `port` of every address, for 0 on any free port.
fn listen(port: u16) -> std::io::Result<TcpListener> {
    let anywhere = |ip| TcpListener::bind(SocketAddr::new(ip, port));
    // `::` takes IPv4 too, as rank 0's store does; a machine without IPv6 has only the second.
    anywhere(Ipv6Addr::UNSPECIFIED.into()).or_else(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse | std::io::ErrorKind::PermissionDenied => Err(error),
        _ => anywhere(Ipv4Addr::UNSPECIFIED.into()),
    })
}

/// Says that `port` cannot be opened, for which `flag` asks.
fn port_error(error: std::io::Error, port: u16, needed: &str) -> Error {
    let what = match error.kind() {
        std::io::ErrorKind::AddrInUse => format!("port {port} is in use"),
        _ => format!("port {port} cannot be opened"),
    };
    Error::config(format!("{what}, and {needed}")).cause(error)
}

/// Returns `port` if rank 0 can listen on it, for 0 any free one.
fn claim_port(port: u16) -> Result<u16> {
    let bound = listen(port).and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| {
        port_error(error, port, "rank 0 needs it for the ranks to meet (`--master-port`)")
            .hint("leave `--master-port` out to take a free one, or name another")
    })
}
