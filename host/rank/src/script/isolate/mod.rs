//! `isolate: true`: a template in a process of its own, which has a memory limit and neither files, network nor devices.
//!
//! The process is this program again, told to serve one template ([`child`]), over pipes ([`protocol`]). It compiles the
//! guest, too: what a stranger's bytes do to the compiler or the parser stays there. Each data worker has its own, so that a
//! template that is ended takes no other's rows along. It dies with the thread that started it.
//!
//! What comes back is not believed: lines are made harmless and counted again, and an answer has a longest length.

mod child;
mod confine;
mod process;
mod protocol;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use host::config::plan::{GuestLimits, GuestRef};
use host::data::template::{OpenTemplate, RowTemplate, SharedTemplate};
use host::{Error, Result};

pub use child::serve;
pub use confine::{is_confined, layers, restrict_calls, restrict_files};
pub use process::Process;

use super::template::digest_with_settings;

/// Opens a template whose file has these `bytes`; a mistake that opening finds is reported here.
pub fn open_template(guest: &GuestRef, bytes: Vec<u8>, limits: &GuestLimits) -> Result<SharedTemplate> {
    let program = std::env::current_exe()
        .map_err(|error| Error::run("cannot tell where this program is, to start it for a template").cause(error))?;
    open_with(&program, guest, bytes, limits)
}

/// The same with another `host-rank` than this program.
pub fn open_with(program: &Path, guest: &GuestRef, bytes: Vec<u8>, limits: &GuestLimits) -> Result<SharedTemplate> {
    let first = Process::start(program, guest, &bytes, limits)?;
    let (program, guest, limits) = (program.to_owned(), guest.clone(), limits.clone());
    let digest = digest_with_settings(&guest, &bytes);
    Ok(Arc::new(Isolated { program, guest, bytes, limits, digest, spare: Mutex::new(Some(first)) }))
}

struct Isolated {
    program: PathBuf,
    guest: GuestRef,
    bytes: Vec<u8>,
    limits: GuestLimits,
    digest: String,
    /// The one that found the template to be sound, until somebody opens it.
    spare: Mutex<Option<Process>>,
}

impl OpenTemplate for Isolated {
    fn open(&self) -> Result<Box<dyn RowTemplate>> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Box::new(match spare {
            Some(process) => process,
            None => Process::start(&self.program, &self.guest, &self.bytes, &self.limits)?,
        }))
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn name(&self) -> String {
        self.guest.path.display().to_string()
    }
}
