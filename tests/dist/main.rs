//! The programs as a user runs them: `host`, its workers, a tiny model, a data set and the shipped guests.
//!
//! What one process can show is tested in it (`numbers`, `scripting`); here is what needs the processes: ranks that meet,
//! die or are interrupted, what a run leaves on disk, and what a worker says of bad input.

mod apart;
mod case;
mod check;
mod checkpoints;
mod clusters;
mod configs;
mod ends;
mod faults;
#[path = "../../host/src/gguf/fixture.rs"]
#[allow(dead_code)]
mod gguf_fixture;
mod hostile;
mod hub;
mod isolate;
mod kit;
mod memory;
mod methods;
mod mistakes;
mod nodes;
mod preview;
mod results;
mod sequence;
mod soak;
#[path = "../support/hub.rs"]
mod support_hub;
