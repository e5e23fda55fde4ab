//! Compiles the C++ shim against the libtorch that `torch-sys` links.

use std::env;
use std::path::{Path, PathBuf};

/// Plain C++ loops, no libtorch header: these are cloned per CPU level and vectorised.
const KERNELS: &[&str] = &["cpp/attention_kernel.cpp", "cpp/kernels.cpp"];

/// Everything that includes libtorch.
const SHIM: &str = "cpp/shim.cpp";

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=HOST_GLOO_INCLUDE");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cpp");

    let libtorch = PathBuf::from(env::var_os("LIBTORCH").expect(
        "LIBTORCH must name a folder with `include` and `lib` of libtorch 2.11; `cargo xtask setup` lays one out",
    ));
    let include = libtorch.join("include");
    let lib = libtorch.join("lib");
    let gloo = gloo_include(&libtorch);

    let mut kernels = base();
    kernels.flag("-mprefer-vector-width=512").flag("-fno-math-errno").flag("-fno-trapping-math");
    // Vector types wider than the baseline never cross a call: every function that takes one is always inlined.
    kernels.flag("-Wno-psabi").warnings(true).files(KERNELS);
    kernels.compile("host_kernels");

    let mut shim = base();
    shim.define("USE_DISTRIBUTED", None).define("USE_C10D_GLOO", None).define("_GLIBCXX_USE_CXX11_ABI", "1");
    shim.warnings(false);
    for path in [&include, &include.join("torch/csrc/api/include"), &gloo] {
        shim.flag("-isystem").flag(path);
    }
    // The loops that matter are in the kernels; here only templates would be optimised, slowly.
    shim.opt_level(1).file(SHIM).compile("host_shim");

    println!("cargo:rustc-link-lib=dylib=gomp");
    println!("cargo:rustc-link-lib=dylib=dl");
    // Only for this crate's own tests and examples; a binary that depends on it sets its own rpath.
    println!("cargo:rustc-link-arg-tests=-Wl,-rpath,{}", lib.display());
}

fn base() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).pic(true).std("gnu++17").opt_level(3).debug(false).flag("-fopenmp").flag("-ffp-contract=fast");
    build
}

/// The wheel has no gloo headers: they come from Debian's `libgloo-dev`, unpacked beside libtorch.
fn gloo_include(libtorch: &Path) -> PathBuf {
    if let Some(path) = env::var_os("HOST_GLOO_INCLUDE") {
        return PathBuf::from(path);
    }
    let beside = libtorch.join("../gloo/usr/include");
    let found = [beside.clone(), libtorch.join("include")].into_iter().find(|p| p.join("gloo/context.h").exists());
    found.unwrap_or_else(|| {
        panic!(
            "no gloo headers: looked for `gloo/context.h` in `{}` and in libtorch's own `include`; \
             `cargo xtask setup` unpacks them, or set HOST_GLOO_INCLUDE",
            beside.display()
        )
    })
}
