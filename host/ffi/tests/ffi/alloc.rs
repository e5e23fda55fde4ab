use host_ffi::alloc::held_by_thread;

#[test]
fn a_thread_is_charged_for_what_it_holds() {
    let before = held_by_thread();
    let mut held = std::hint::black_box(vec![0u8; 1000]);
    assert_eq!(held_by_thread() - before, 1000);
    held.reserve_exact(4000);
    assert_eq!(held_by_thread() - before, 5000);
    let zeroed = std::hint::black_box(vec![0u64; 10]);
    assert_eq!(held_by_thread() - before, 5080);
    // Whoever frees it is credited.
    let other = std::thread::spawn(move || {
        let before = held_by_thread();
        drop(held);
        held_by_thread() - before
    });
    assert_eq!(other.join().unwrap(), -5000);
    drop(zeroed);
}
