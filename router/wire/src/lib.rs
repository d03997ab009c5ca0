//! Bytes on the wire: protobuf messages, frame codec, conversions to and from the core types.
