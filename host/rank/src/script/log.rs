//! Lines a guest writes: made harmless, cut, counted, then handed to the run's log.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use host::config::limits::LOG_LINE as MAX_LINE;

/// How much of the end of the guest's output is kept for its failure report.
const TAIL: usize = 8 * 1024;

/// `message` as one line: control characters replaced (a terminal obeys them), cut at [`MAX_LINE`] bytes.
pub fn clean_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len().min(MAX_LINE));
    for character in message.chars() {
        // The bidirectional overrides make a terminal show another text than the one that was written.
        let character = match character {
            '\t' => ' ',
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            c if c.is_control() => '\u{fffd}',
            c => c,
        };
        if line.len() + character.len_utf8() > MAX_LINE - '…'.len_utf8() {
            line.push('…');
            break;
        }
        line.push(character);
    }
    line
}

/// A guest's log: counts lines and keeps the last bytes of standard output and error.
#[derive(Default)]
pub struct GuestLog {
    name: String,
    /// How many lines it may write: a loop that logs must not fill the disk.
    max_lines: usize,
    lines: usize,
    partial: Vec<u8>,
    tail: VecDeque<u8>,
}

impl GuestLog {
    pub fn new(name: impl Into<String>, max_lines: usize) -> Self {
        Self { name: name.into(), max_lines, ..Self::default() }
    }

    pub fn line(&mut self, message: &str) {
        self.lines += 1;
        if self.lines <= self.max_lines {
            tracing::info!(target: "guest", guest = %self.name, "{}", clean_line(message));
        } else if self.lines == self.max_lines + 1 {
            let most = self.max_lines;
            tracing::warn!(
                target: "guest", guest = %self.name,
                "{most} lines were logged; the rest is dropped (`limits.log_lines`)"
            );
        }
    }

    /// Takes bytes of the guest's standard output or error.
    pub fn write(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL));
        for &byte in bytes {
            if byte == b'\n' {
                self.flush();
            } else if self.partial.len() < MAX_LINE {
                self.partial.push(byte);
            }
        }
    }

    /// The end of what the guest wrote to standard output and error, line by line.
    pub fn tail(&self) -> Vec<String> {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).lines().map(clean_line).filter(|line| !line.trim().is_empty()).collect()
    }

    fn flush(&mut self) {
        let line = std::mem::take(&mut self.partial);
        self.line(&String::from_utf8_lossy(&line));
    }
}

/// The log as a guest's output streams and its host calls share it.
#[derive(Clone)]
pub struct SharedLog(Arc<Mutex<GuestLog>>);

impl SharedLog {
    pub fn new(name: &str, max_lines: usize) -> Self {
        Self(Arc::new(Mutex::new(GuestLog::new(name, max_lines))))
    }

    pub fn line(&self, message: &str) {
        self.lock().line(message);
    }

    pub fn write(&self, bytes: &[u8]) {
        self.lock().write(bytes);
    }

    pub fn tail(&self) -> Vec<String> {
        self.lock().tail()
    }

    fn lock(&self) -> MutexGuard<'_, GuestLog> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_cannot_steer_a_terminal() {
        assert_eq!(clean_line("a\u{1b}[2Jb\nc\r\td\u{202e}e"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd} d\u{fffd}e");
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let line = clean_line(&"é".repeat(2000));
        assert!(line.len() <= MAX_LINE && line.ends_with('…'), "{}", line.len());
    }

    #[test]
    fn the_tail_is_the_end() {
        let mut log = GuestLog::new("g", 10);
        for i in 0..5000 {
            log.write(format!("line {i}\n").as_bytes());
        }
        assert_eq!(log.tail().last().unwrap(), "line 4999");
        assert!(log.tail().len() < 1000);
    }
}
