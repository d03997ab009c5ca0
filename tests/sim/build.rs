//! Exports the program's own `getrandom`, so that libraries which look it up at run time find it, and names the function by which the
//! cryptographic library takes another source of entropy: see `src/entropy.rs`.

use std::{env, fs, path::Path};

fn main() {
    println!("cargo::rustc-link-arg=-rdynamic");
    // All names of that library begin with its version.
    let is_library = |key: &str| key.starts_with("DEP_AWS_LC_RS_") && key.ends_with("_LIBCRYPTO");
    let name = env::vars().find_map(|(key, value)| is_library(&key).then_some(value));
    let name = name.expect("invariant: aws-lc-rs says what it links");
    let prefix = name.trim_end_matches("crypto");
    let text = format!(
        "unsafe extern \"C\" {{\n    \
             #[link_name = \"{prefix}override_entropy_source_method_FOR_TESTING\"]\n    \
             fn override_entropy_source(methods: *const EntropyMethods);\n\
         }}\n"
    );
    let dir = env::var("OUT_DIR").expect("invariant: cargo sets it");
    fs::write(Path::new(&dir).join("aws_lc.rs"), text).expect("the build directory is writable");
}
