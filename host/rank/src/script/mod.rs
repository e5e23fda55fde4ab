//! Guests: recipes and templates, as Wasm components or Rhai scripts, over one surface.
//!
//! `sdk/wit` is the source of that surface and [`api`] the only place with behaviour: [`wasm`] and [`rhai`] convert values
//! and report failures. Guests get nothing else: no files, network, clock, environment or entropy.
//!
//! Everything here is synchronous. A recipe runs on a thread of its own with a large stack, because libtorch and
//! collectives run inside its calls.

pub mod api;
mod check;
pub mod guest;
mod handles;
pub mod isolate;
mod job;
pub mod limits;
mod log;
mod loss;
pub mod rhai;
// Generated: one shape for every function, also where a hand would write less.
#[rustfmt::skip]
#[allow(clippy::redundant_closure)]
mod rhai_generated;
mod run;
mod settings;
pub mod template;
mod tensors;
mod test;
pub mod training;
pub mod wasm;

use host::Result;
use host::config::limits::{GuestLimits, SCRIPT_STACK};
use host::config::plan::GuestRef;
use host::worker::StopFlag;

use guest::{Blame, Guest, World};

pub use check::check;
pub use guest::SDK_VERSION;
pub use job::{templates, train};
pub use loss::open_loss;
pub use template::open_template;
pub use test::test;
pub use training::{BatchInfo, Training};

/// Runs `work` on a thread whose stack is large enough for a guest, libtorch and collectives on top of each other.
pub fn on_big_stack<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("script".into())
            .stack_size(SCRIPT_STACK)
            .spawn_scoped(scope, work)
            .map_err(|error| host::Error::run("cannot start the script thread").cause(error))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// A recipe that was read, checked and compiled, before the run it drives is built.
pub struct Recipe {
    blame: Blame,
    limits: GuestLimits,
    /// Of the file's bytes; written beside checkpoints.
    digest: String,
    front: Front,
}

enum Front {
    Wasm(wasm::Recipe),
    Rhai(String),
}

impl Recipe {
    /// Finds every mistake that can be found without running it.
    pub fn load(guest: &GuestRef, limits: &GuestLimits) -> Result<Self> {
        let content = guest::read(&guest.path, World::Recipe, limits)?;
        let digest = match &content {
            Guest::Component(bytes) => blake3::hash(bytes),
            Guest::Script(text) => blake3::hash(text.as_bytes()),
        };
        let front = match content {
            Guest::Component(bytes) => Front::Wasm(wasm::Recipe::load(&guest.path, &bytes, limits)?),
            Guest::Script(text) => {
                rhai::check_recipe(&guest.path, &text, limits)?;
                Front::Rhai(text)
            }
        };
        let blame = Blame { world: World::Recipe, path: guest.path.clone(), place: None };
        Ok(Self { blame, limits: limits.clone(), digest: digest.to_string(), front })
    }

    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Runs the recipe to its end on the calling thread, which must have a large stack ([`on_big_stack`]).
    ///
    /// An error of `training` comes back unchanged; any other is the recipe's own and names its file, place and step.
    /// A recipe that returns before the run is complete failed as well: its last checkpoint was never written.
    ///
    /// `stop` is the flag that `training` answers at its next turn; here it only ends a guest that does not come back.
    pub fn run(self, training: Box<dyn Training>, stop: StopFlag) -> Result<()> {
        match self.front {
            Front::Wasm(recipe) => recipe.run(self.blame, &self.limits, training, stop),
            Front::Rhai(text) => rhai::run_recipe(&text, self.blame, &self.limits, training, stop),
        }
    }
}
