//! apt with a state folder of its own: works without root, and in containers whose lists are deleted.
//!
//! Everything lives under `.demo/apt`; the system's package state is neither read nor changed, only its sources and keys
//! are used.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell::{Failure, PathContext, Result, capture, command, is_root, run, works};

const DIR: &str = ".demo/apt";

pub struct Apt {
    root: PathBuf,
}

impl Apt {
    /// Fetches the package lists; `None` where there is no apt.
    pub fn open(root: &Path) -> Result<Option<Self>> {
        if !works("apt-get", &["--version"]) {
            return Ok(None);
        }
        let dir = root.join(DIR);
        for folder in ["lists/partial", "cache/archives/partial"] {
            let folder = dir.join(folder);
            std::fs::create_dir_all(&folder).path_context("create", &folder)?;
        }
        let status = dir.join("status");
        std::fs::write(&status, "").path_context("write", &status)?;
        let apt = Self { root: root.to_owned() };
        let offline = |failure: Failure| {
            failure.hint("check the network and the sources in `/etc/apt`, then run the same command again")
        };
        run(apt.get().args(["-qq", "update"])).map_err(offline)?;
        Ok(Some(apt))
    }

    /// Downloads a package and returns its file.
    pub fn download(&self, package: &str) -> Result<PathBuf> {
        let folder = self.root.join(DIR).join("download");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).path_context("create", &folder)?;
        run(self.get().current_dir(&folder).args(["-qq", "download", package]))?;
        let file = std::fs::read_dir(&folder).path_context("read", &folder)?.flatten().next();
        file.map(|file| file.path()).ok_or_else(|| Failure::new(format!("apt downloaded no file for `{package}`")))
    }

    /// Returns the text of every list whose name holds `part`, whatever its compression.
    pub fn lists(&self, part: &str) -> Result<Vec<String>> {
        let folder = self.root.join(DIR).join("lists");
        let mut files: Vec<_> = std::fs::read_dir(&folder).path_context("read", &folder)?.flatten().collect();
        files.retain(|file| file.file_name().to_string_lossy().contains(part));
        files.sort_by_key(|file| file.file_name());
        let helper = "/usr/lib/apt/apt-helper";
        files.iter().map(|file| capture(command(&self.root, helper).arg("cat-file").arg(file.path()))).collect()
    }

    fn get(&self) -> Command {
        let mut get = command(&self.root, "apt-get");
        let dir = self.root.join(DIR);
        for (option, file) in [
            ("Dir::State", ""),
            ("Dir::State::status", "status"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            get.arg("-o").arg(format!("{option}={}", dir.join(file).display()));
        }
        // Images of containers switch the translations off, and with them the long descriptions.
        get.args(["-o", "Acquire::Languages=en"]);
        if is_root() {
            get.args(["-o", "APT::Sandbox::User=root"]);
        }
        get
    }
}
