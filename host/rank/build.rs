//! Lets the worker and its tests find the libtorch they were built against. The launcher's `LD_LIBRARY_PATH` comes first.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
}
