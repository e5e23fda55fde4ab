//! How many bytes each thread holds, counted by the process's allocator.
//!
//! Rhai bounds a value, but neither the sum of values nor what a function keeps; the worker asks here what a script has
//! taken. libtorch's memory is not in it: that comes from C++.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
}

/// Bytes that this thread has allocated and not freed; below zero where it frees what others have allocated.
pub fn held_by_thread() -> isize {
    HELD.get()
}

fn add(bytes: usize) {
    HELD.set(HELD.get().wrapping_add_unsigned(bytes));
}

fn take(bytes: usize) {
    HELD.set(HELD.get().wrapping_sub_unsigned(bytes));
}

/// The system's allocator, counting.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing, as the cell is constant at the
// start and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let new = unsafe { System.alloc(layout) };
        if !new.is_null() {
            add(layout.size());
        }
        new
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let new = unsafe { System.alloc_zeroed(layout) };
        if !new.is_null() {
            add(layout.size());
        }
        new
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let new = unsafe { System.realloc(old, layout, size) };
        if !new.is_null() {
            take(layout.size());
            add(size);
        }
        new
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.dealloc(old, layout) };
        take(layout.size());
    }
}
