//! Libraries that panic on a file they do not expect: what they say becomes an error, and no report of a defect of ours.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` of a library over a stranger's file. What it leaves half done when it panics must not be used again.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let before = EXPECTED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    EXPECTED.set(before);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        text.unwrap_or("its parts do not belong together").to_owned()
    })
}

/// Whether a panic of this thread is one that [`caught`] waits for: a panic hook has nothing to say of it.
pub fn is_expected() -> bool {
    EXPECTED.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_its_message() {
        assert_eq!(caught(|| 3), Ok(3));
        let inner = || caught(|| -> i32 { panic!("no {}", "more") });
        assert_eq!(inner(), Err("no more".to_owned()));
        assert_eq!(caught(inner), Ok(Err("no more".to_owned())));
        assert!(!is_expected() && caught(is_expected) == Ok(true));
    }
}
