namespace helexa { namespace HELEXA_ISA { void placeholder() {} } }
