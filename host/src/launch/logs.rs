//! Where the workers' output goes: the terminal, files, or both.

use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{IoContext, Result};

/// Standard output and standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Out,
    Err,
}

/// Some streams of some workers, as torchrun writes them: `3`, or `0:1,1:2` by local rank, each 1 (stdout) + 2 (stderr).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    of_all: u8,
    of_rank: Vec<(usize, u8)>,
}

impl Streams {
    pub const ALL: Self = Self { of_all: 3, of_rank: vec![] };

    fn has(&self, local_rank: usize, stream: Stream) -> bool {
        let bits = self.of_rank.iter().find(|(rank, _)| *rank == local_rank).map_or(self.of_all, |(_, bits)| *bits);
        bits & if stream == Stream::Out { 1 } else { 2 } != 0
    }
}

impl FromStr for Streams {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let bits = |text: &str| text.parse().ok().filter(|bits| *bits <= 3);
        let of_rank = |pair: &str| {
            let (rank, streams) = pair.split_once(':')?;
            Some((rank.parse().ok()?, bits(streams)?))
        };
        if let Some(of_all) = bits(text) {
            return Ok(Self { of_all, of_rank: vec![] });
        }
        let of_rank = text.split(',').map(of_rank).collect::<Option<_>>();
        let of_rank = of_rank.ok_or("0 to 3 is needed (1 stdout, 2 stderr, 3 both), or `RANK:STREAMS,…`")?;
        Ok(Self { of_all: 0, of_rank })
    }
}

/// What the command line says about the workers' output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Logs {
    pub dir: Option<PathBuf>,
    /// To files alone.
    pub redirects: Streams,
    /// To files and the terminal.
    pub tee: Streams,
    /// Local ranks whose output is shown; empty: all.
    pub shown: Vec<usize>,
}

/// Where one stream of a worker goes.
#[derive(Debug)]
pub(super) struct Sinks {
    pub is_shown: bool,
    pub file: Option<File>,
}

impl Logs {
    pub(super) fn sinks(&self, rank: usize, local_rank: usize, stream: Stream) -> Result<Sinks> {
        let is_redirected = self.redirects.has(local_rank, stream);
        let is_teed = self.tee.has(local_rank, stream);
        let is_shown = (is_teed || !is_redirected) && (self.shown.is_empty() || self.shown.contains(&local_rank));
        let file = match &self.dir {
            Some(dir) if is_redirected || is_teed => {
                let folder = dir.join(format!("rank_{rank}"));
                std::fs::create_dir_all(&folder).path_context("create", &folder)?;
                let path = folder.join(if stream == Stream::Out { "stdout.log" } else { "stderr.log" });
                Some(File::create(&path).path_context("create", &path)?)
            }
            _ => None,
        };
        Ok(Sinks { is_shown, file })
    }
}

impl Sinks {
    /// Nothing between the worker and our own stream is needed.
    pub fn is_plain(&self) -> bool {
        self.is_shown && self.file.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_read_as_torchrun_does() {
        let of = |text: &str| text.parse::<Streams>();
        assert!(of("3").unwrap().has(7, Stream::Out) && of("3").unwrap().has(7, Stream::Err));
        assert!(of("1").unwrap().has(0, Stream::Out) && !of("1").unwrap().has(0, Stream::Err));
        let by_rank = of("0:1,2:2").unwrap();
        let has = |rank| (by_rank.has(rank, Stream::Out), by_rank.has(rank, Stream::Err));
        assert_eq!((has(0), has(1), has(2)), ((true, false), (false, false), (false, true)));
        for bad in ["", "4", "0:4", "a", "0:1,", "-1"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
