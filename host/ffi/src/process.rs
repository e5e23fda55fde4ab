//! What a process has before its first line.

use std::io;
use std::os::fd::RawFd;

/// Closes every file this process was started with, but for standard input, output and error.
///
/// Call it before anything opens one: libraries of the program that started this one may not close theirs on `exec`.
pub fn close_inherited_files() -> io::Result<()> {
    let listed = std::fs::read_dir("/proc/self/fd")?;
    let numbers: Vec<RawFd> = listed.filter_map(|name| name.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // SAFETY: nothing in this process owns the file, as the caller promises to come first. The one that listed them
        // is closed already, which the kernel answers with an error that `close` ignores.
        unsafe { rustix::io::close(number) };
    }
    Ok(())
}
